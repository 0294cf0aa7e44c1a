"""From exported programs to an ExecuTorch program whose layers XNNPACK computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Node

from taskzip.errors import ExportError

ALIGNMENT = 16
"""Of the parts of a file, in bytes: what XNNPACK asks of weights. ExecuTorch's own 128 make small files larger."""


def lowered(programs: Mapping[str, ExportedProgram], largest: int) -> Any:
    """An `ExecutorchProgramManager` with a method for each program.

    Args:
        programs: by the name of the method.
        largest: bytes of weights that XNNPACK should load at once. While it loads them they are in memory twice, as
            they lie in the file and as it packs them.

    Raises:
        ExportError: an operator that ExecuTorch's runtime, as it is installed here, does not have.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from torch.fx.passes.infra.partitioner import Partition

    class InPieces(XnnpackPartitioner):  # type: ignore[misc]
        def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
            place = {node: i for i, node in enumerate(ep.graph.nodes)}
            whole = [sorted(partition.nodes, key=place.__getitem__) for partition in super().generate_partitions(ep)]
            pieces = [piece for nodes in whole for piece in _pieces(nodes, largest)]
            return [Partition(id=i, nodes=piece) for i, piece in enumerate(pieces)]

    edge = to_edge_transform_and_lower(dict(programs), partitioner=[InPieces()])
    graphs = {method: list(edge.exported_program(method).graph.nodes) for method in programs}
    program = edge.to_executorch(ExecutorchBackendConfig(segment_alignment=ALIGNMENT))
    _check_kernels(program, graphs)
    return program


def _check_kernels(lowered: Any, graphs: Mapping[str, list[Node]]) -> None:
    """Look for operators without a kernel, at the node that `failures.place` finds."""
    from executorch.runtime import Runtime

    known = Runtime.get().operator_registry.operator_names
    for plan in lowered.executorch_program.execution_plan:
        for operator in plan.operators:
            if f"{operator.name}.{operator.overload}".rstrip(".") not in known:
                called = operator.name.partition("::")[2]
                node = next((each for each in graphs[plan.name] if f".{called}." in f".{each.target}."), None)  # noqa: F841
                raise ExportError(f"ExecuTorch's runtime has no {operator.name}")


def _pieces(nodes: Iterable[Node], largest: int) -> list[list[Node]]:
    """Nodes that XNNPACK computes, in the order in which they run, cut in front of layers."""
    constants = {node for node in nodes if node.op != "call_function"}
    pieces: list[list[Node]] = [[]]
    held = 0
    for node in (node for node in nodes if node.op == "call_function"):
        own = [each for each in node.all_input_nodes if each in constants]
        size = sum(each.meta["val"].nbytes for each in own)
        if held and held + size > largest and _is_layer(node):
            pieces.append([])
            held = 0
        pieces[-1] += [node, *own]
        constants -= set(own)
        held += size
    return pieces


def _is_layer(node: Node) -> bool:
    return any(f".{name}." in f".{node.target}." for name in ("linear", "convolution"))
