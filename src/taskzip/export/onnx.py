"""A joint network as one ONNX file: every shared block once, and what the tasks have in common computed once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from taskzip.errors import ExportError
from taskzip.export.agreement import check, other_sizes
from taskzip.export.dynamic import Axes, axes_of, other_shapes
from taskzip.export.example import Example
from taskzip.export.failures import explained, reason
from taskzip.export.joint import chosen, output_names, traced
from taskzip.export.quiet import quietly
from taskzip.export.selections import move_selections
from taskzip.export.splitting import split_layers
from taskzip.export.target import Unwritten, on_disk, writable, writing
from taskzip.export.turning import turn_weights
from taskzip.tasks import device_of, evaluating
from taskzip.zipped import ZippedModel, installed, spec_of

LARGEST = 2**31 - 2**20
"""Bytes that one ONNX file can hold."""


def export_onnx(
    zipped: ZippedModel,
    path: str | Path,
    example: Any,
    tasks: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    by_block: bool = False,
    dynamic_shapes: Any = None,
) -> None:
    """Write a joint network to one ONNX file, and check with ONNX Runtime that it gives the same outputs.

    The outputs are called after the tasks: "digits", or "digits.0" and "digits.logits" where the network returns a
    tuple, a dict or a dataclass. A shared block is one initializer, from which each task's weight is put together in
    the graph; layers that are fully shared and read the same input run once, and with `zip(cross=False)` what is shared
    of each layer.

    Args:
        zipped: the joint network; it is exported as it is in eval mode, and not changed.
        path: where the file goes.
        example: what the networks read, one input for all tasks: a tensor, a tuple of arguments, or a dict of keyword
            arguments. Or one for each task: a dict whose keys are the names of the exported tasks. The inputs of the
            file are then called "input", "input.0" or as the keyword; or "input.digits", "input.digits.0" and
            "input.digits.keyword". Arguments that are no tensors become part of the file.
        tasks: which tasks the file holds, and in which order; default all.
        dynamic_batch: whether the file takes batches of any size: all tensors whose first axis is as long as that of
            the first tensor.
        by_block: whether layers that are shared in part are computed block by block. ONNX Runtime puts weights
            together from their blocks when it loads the file, which leaves it with a copy for every task; then it does
            not, and quantisers find the blocks too, but runs are slower (docs/device.md).
        dynamic_shapes: in place of `dynamic_batch`, which axes may have other sizes than in the example: in its form,
            with what `torch.export.export` takes for each tensor, {0: Dim("batch"), 1: Dim("length", max=512)}.

    Raises:
        InputError: no joint network, tasks that it does not have, or an example that does not fit.
        ExportError: packages that are not installed, a network that cannot be exported, a file that cannot be written,
            or one whose outputs differ from PyTorch's by more than `TOLERANCE`. Nothing is left behind.
    """
    _check_installed()
    networks = chosen(zipped, tasks)
    target = writable(path)
    given = Example(example, list(networks), device_of(zipped))
    axes, by_batch = axes_of(given, dynamic_batch, dynamic_shapes), dynamic_shapes is None
    _check_size(networks, path)

    def made(tasks: Sequence[str], example: Example, axes: Axes, file: Path) -> None:
        some = {task: networks[task] for task in tasks}
        names = [name for task in tasks for name in called[task]]
        program, tensors = traced(some, example, axes)
        sizes = other_sizes(example) if by_batch and axes else other_shapes(program, list(tensors))
        model = _model(program, example, names, axes, by_block, _computed_apart(some))
        with on_disk(path):
            _write(model, file)
        del model, program  # which hold all weights
        check(some, example, sizes, _runner(file, some))

    with evaluating(*networks.values()), quietly(), writing(path, target) as part:
        called = output_names(networks, given)

        def alone(task: str, axes: Axes) -> None:
            made([task], given.only(task), axes, part)

        try:
            made(list(networks), given, axes, part)
        except Unwritten:
            raise
        except Exception as error:  # torch raises whatever the network raises, and a dozen classes of its own
            raise explained(error, networks, alone, axes, "dynamic_batch=False" if by_batch else None) from error


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ExportError(
            f"writing ONNX needs {error.name}, which is not installed: pip install 'taskzip[onnx]'"
        ) from error


def _check_size(networks: dict[str, nn.Module], path: str | Path) -> None:
    own = {t for network in networks.values() for t in (*network.parameters(), *network.buffers())}
    size = sum(tensor.nbytes for tensor in own)
    if size > LARGEST:
        raise ExportError(
            f"cannot write {path}: the weights are {size / 2**30:.1f} GiB, and one ONNX file holds 2: choose fewer "
            f"tasks, tasks=[...]."
        )


def _computed_apart(networks: dict[str, nn.Module]) -> bool:
    """Whether units of some layer are computed group by group."""
    return any(spec_of(b).apart for network in networks.values() for b in installed(network).values())


def _model(
    exported: ExportedProgram, example: Example, names: list[str], axes: Axes, by_block: bool, apart: bool
) -> Any:
    """The graph of all tasks, in which equal parts are one."""
    import torch.onnx

    program = torch.onnx.export(
        exported,
        input_names=list(example.tensors),
        output_names=names,
        dynamo=True,
        # Would put weights together while exporting, each a copy of its blocks, and fold private batch-norm into copies
        # of shared kernels.
        optimize=False,
        verbose=False,
    )
    assert program is not None
    model = program.model
    _unite(model, by_block, apart)
    _name(model, list(example.tensors), names)
    _name_axes(model, axes)
    return model


def _unite(model: Any, by_block: bool, apart: bool) -> None:
    """Compute shapes that are known, split layers if wanted; then equal constants become one, and equal nodes.

    Where units are computed `apart`, so is what is done with them up to the next layer.
    """
    import onnx_ir
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    # Orders of units, which are numbers of 64 bits, may be computed with; weights may not, for that would copy them.
    weights = {name for name, value in model.graph.initializers.items() if value.dtype != onnx_ir.DataType.INT64}
    optimizer.fold_constants(
        model, should_fold=lambda node: False if any(i is not None and i.name in weights for i in node.inputs) else None
    )
    if by_block:
        split_layers(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    if apart:
        move_selections(model)
    _straighten(model)
    for each in (
        passes.DeduplicateHashedInitializersPass(size_limit=LARGEST),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.OutputFixPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        each(model)
    turn_weights(model)


def _straighten(model: Any) -> None:
    """Put the numbers of every tensor into their order: channels last, for example, is another one."""
    import onnx_ir

    for value in model.graph.initializers.values():
        array = value.const_value.numpy()
        if not array.flags.c_contiguous:
            value.const_value = onnx_ir.Tensor(np.ascontiguousarray(array), dtype=value.dtype, name=value.name)


def _name(model: Any, inputs: list[str], outputs: list[str]) -> None:
    """Call inputs and outputs what they should be: one that is both, or two outputs at once, has lost its name."""
    import onnx_ir.passes.common as passes

    values = [value for node in model.graph for value in node.outputs]
    for value in values:
        value.name = None
    for value in (*values, *model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()  # what torch called it
    for value, name in zip([*model.graph.inputs, *model.graph.outputs], [*inputs, *outputs], strict=True):
        value.name = name
    passes.NameFixPass()(model)


def _name_axes(model: Any, axes: Axes) -> None:
    """Call the axes of any length by their names, where the exporter has numbers for them."""
    import onnx_ir

    names = {}
    for value in model.graph.inputs:
        for axis, dim in axes.get(value.name, {}).items():
            size = value.shape[axis]
            if isinstance(size, onnx_ir.SymbolicDim) and isinstance(dim, Dim) and (size.value or "").isidentifier():
                names[size.value] = dim.__name__
    for shape in (value.shape for value in (*model.graph.inputs, *model.graph.outputs) if value.shape is not None):
        for i, dim in enumerate(shape):
            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value is not None:  # which may be "2*s77"
                shape[i] = re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), dim.value)


def _write(model: Any, file: Path) -> None:
    import onnx_ir

    proto = onnx_ir.to_proto(model)
    del proto.graph.value_info[:]  # types and shapes in between, which follow from those of inputs and weights
    file.write_bytes(proto.SerializeToString())


def _runner(file: Path, networks: dict[str, nn.Module]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Gives the outputs of the file, by name, from tensors by name.

    Raises:
        ExportError: ONNX Runtime cannot load or run it.
    """
    import onnxruntime

    def refused(what: str, error: Exception) -> ExportError:
        half = {p.dtype for network in networks.values() for p in network.parameters()} & {torch.bfloat16}
        hint = ", which has few operators for bfloat16 (take zipped.float())" if half else ""
        why = reason(error).replace(str(file), "the file")
        return ExportError(f"what was exported cannot be {what} by ONNX Runtime{hint}: {why}")

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it says of errors is in the errors
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # classes of its own without a common base
        raise refused("loaded", error) from error
    read = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]

    def run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {name: tensor.numpy(force=True) for name, tensor in tensors.items() if name in read}
        try:
            found = session.run(names, given)
        except Exception as error:  # as above
            raise refused("run", error) from error
        return {name: torch.as_tensor(value) for name, value in zip(names, found, strict=True)}

    return run
