"""Reading a node of the graph: its name, its arguments, and what all rules do with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from taskzip.graph._values import Axes, Context, Strands

Arguments = dict[str, Any]
Rule = Callable[[Context, Node, Arguments], Strands | list[Strands]]


def op_name(node: Node) -> str:
    """`conv2d` for `aten.conv2d.default`, `conv2d_` for its in-place twin; with its namespace what is no ATen op."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target.name().removeprefix("aten::").split(".")[0]
    return getattr(node.target, "__name__", str(node.target))


def arguments(node: Node) -> Arguments:
    """The arguments of an ATen call by their names in the schema, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}


def none_of(node: Node) -> Strands | list[Strands]:
    """Fixed axes, as many as the node's value has."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [(None,) * v.dim() if isinstance(v, Tensor) else () for v in value]
    return (None,) * value.dim() if isinstance(value, Tensor) else ()


def unknown(c: Context, node: Node, reason: str) -> Strands | list[Strands]:
    """Nothing moves of what a node reads."""
    for source in node.all_input_nodes:
        c.pin_value(source, reason)
    return none_of(node)


def first(a: Arguments) -> Node:
    """The first argument."""
    source = next(iter(a.values()))
    assert isinstance(source, Node)
    return source


def at(c: Context, a: Arguments) -> tuple[Axes, int]:
    """The axes of the first argument, and the one that `dim` names."""
    axes = c.axes(first(a))
    return axes, a["dim"] % len(axes)


def named_dims(dim: int | Sequence[int] | None, count: int) -> set[int]:
    """The axes that an argument `dim` names; all of them for none."""
    dims = range(count) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return {d % count for d in dims} if count else set()


def unify_all(c: Context, several: Sequence[Axes], reason: str) -> Axes:
    """Tensors whose axes are in the same order, one by one."""
    out = list(several[0])
    for axes in several[1:]:
        out = [one if one is other else c.unify(one, other, reason) for one, other in zip(out, axes, strict=True)]
    return tuple(out)
