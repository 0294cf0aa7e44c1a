"""A joint network as one graph of torch's own operators, for PyTorch and for all that reads its graphs."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from taskzip.export.agreement import check, other_sizes
from taskzip.export.blockwise import LAYERS, join_weights, split_layers
from taskzip.export.dynamic import Axes, axes_of, other_shapes
from taskzip.export.example import Example
from taskzip.export.failures import explained
from taskzip.export.graphs import JointGraph, arguments, aten
from taskzip.export.joint import check_form, chosen, output_names, traced
from taskzip.export.quiet import quietly
from taskzip.tasks import device_of, evaluating
from taskzip.zipped import LARGE, LARGE_LINEAR, ZippedModel

_LARGE = {layer: LARGE_LINEAR if layer is aten.linear.default else LARGE for layer in LAYERS}
"""Numbers in a weight from which on it is not put together in every call."""

_MEANT_OTHERWISE = ("torch", "device", "inf", "nan", "NoneType", "builtins", "operator", "math", "fx_pytree", "pytree")
"""What names may mean in the code of a graph."""


def export_graph(
    zipped: ZippedModel,
    example: Any,
    tasks: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    partly_shared: Literal["blocks", "weights"] = "blocks",
    dynamic_shapes: Any = None,
) -> GraphModule:
    """A joint network as one graph in PyTorch, in which what the tasks have in common is computed once.

    Nothing is looked up while it runs, so that it is fast for single small inputs too, where `zipped(x)` is not. It is
    the network as it is now, for inference: its weights are the tensors of the joint network, but for those that lie
    in another order of memory; equal ones are one, and none gets gradients. After the network has changed another graph
    has to be made. `torch.compile` and `torch.export.export` take it, and thereby what reads exported programs:
    `torch.export.save`, AOTInductor, converters for other runtimes.

    Args:
        zipped: the joint network; its graph is made as it is in eval mode, and it is not changed.
        example: what the networks read, one input for all tasks: a tensor, a tuple of arguments, or a dict of keyword
            arguments. Or one for each task: a dict whose keys are the names of the tasks. Arguments that are no tensors
            become part of the graph.
        tasks: which tasks the graph holds, and in which order; default all.
        dynamic_batch: whether it takes batches of any size: all tensors whose first axis is as long as that of the
            first tensor. Other sizes are the example's.
        partly_shared: a layer of which only some units are shared is computed from "blocks", or puts its weight
            together from them in every call where it is small; or it has "weights" of its own for each task, which is
            faster and takes more memory.
        dynamic_shapes: in place of `dynamic_batch`, which axes may have other sizes than in the example: in its form,
            with what `torch.export.export` takes for each tensor, {0: Dim("batch"), 1: Dim("length", max=512)}.

    Returns:
        A module whose arguments are the tensors of the example, in its order, called "input", "input_0" or as the
        keyword, and with one input for each task "input_digits" and so on. It gives a dict of the outputs: "digits", or
        "digits.0" and "digits.logits" where the network returns a tuple, a dict or a dataclass.

    Raises:
        InputError: no joint network, tasks that it does not have, or an example or setting that does not fit.
        ExportError: a network that cannot be exported, or a graph whose outputs differ from the networks' by more than
            `agreement.TOLERANCE`.
    """
    check_form(partly_shared)
    networks = chosen(zipped, tasks)
    given = Example(example, list(networks), device_of(zipped))
    axes, by_batch = axes_of(given, dynamic_batch, dynamic_shapes), dynamic_shapes is None

    def made(tasks: Sequence[str], example: Example, axes: Axes) -> GraphModule:
        some = {task: networks[task] for task in tasks}
        names = [name for task in tasks for name in called[task]]
        program, tensors = traced(some, example, axes)
        sizes = other_sizes(example) if by_batch and axes else other_shapes(program, list(tensors))
        joint = JointGraph(program, list(tensors), names)
        if partly_shared == "weights":
            join_weights(joint)
        else:
            split_layers(joint, math.inf, _LARGE)
        graph = _with_names(joint.part(list(tensors), names), list(tensors), names)
        with torch.no_grad():
            check(some, example, sizes, lambda tensors: graph(*tensors.values()))
        return graph

    def alone(task: str, axes: Axes) -> None:
        made([task], given.only(task), axes)

    with evaluating(*networks.values()), quietly():
        called = output_names(networks, given)
        try:
            return made(list(networks), given, axes)
        except Exception as error:  # torch raises whatever the network raises, and a dozen classes of its own
            raise explained(error, networks, alone, axes, "dynamic_batch=False" if by_batch else None) from error


def _with_names(module: GraphModule, inputs: Sequence[str], outputs: Sequence[str]) -> GraphModule:
    """Call arguments and outputs by their names, in place, and let no gradient run into the weights."""
    taken = {"self", *_MEANT_OTHERWISE}
    for node, name in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        called = re.sub(r"\W", "_", name)
        while called in taken or keyword.iskeyword(called):
            called += "_"
        taken.add(called)
        node.target = called
    (output,) = module.graph.find_nodes(op="output")
    given = _apart(module.graph, output)
    output.args = (dict(zip(outputs, given, strict=True)),)
    module.recompile()
    for name, parameter in list(module.named_parameters()):
        delattr(module, name)
        module.register_buffer(name, parameter.detach())
    return module.eval()


def _apart(graph: Graph, output: Node) -> list[Node]:
    """The outputs, of which none lies where a weight or another output does: whoever gets it may write into it."""
    owners: set[Node] = set()
    given: list[Node] = []
    for node in arguments(output)[0]:
        owner = node
        while owner.op == "call_function" and _is_view(owner.target):
            owner = arguments(owner)[0]
        if owner.op == "get_attr" or owner in owners:
            with graph.inserting_before(output):
                node = graph.call_function(aten.clone.default, (node,))
        owners.add(owner)
        given.append(node)
    return given


def _is_view(target: Any) -> bool:
    """Whether what an operator gives may lie where its first argument does."""
    return isinstance(target, OpOverload) and any(each.alias_info is not None for each in target._schema.returns)
