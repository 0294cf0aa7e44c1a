"""Rules for ops that do the same to every element, or that do not care in which order they see the units."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from taskzip.graph._nodes import Arguments, at, first, named_dims, none_of, op_name
from taskzip.graph._values import Axes, Context, Strands, shape_of


def same(c: Context, node: Node, a: Arguments) -> Strands:
    return c.strands(first(a))


def softmax(c: Context, node: Node, a: Arguments) -> Axes:
    """The same for every element only where all that are summed keep together: it does not know of strands."""
    return c.axes(first(a))


def pointwise(c: Context, node: Node, a: Arguments) -> Strands:
    tensors = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
    if len(tensors) == 1 and shape_of(tensors[0]) == shape_of(node):
        return c.strands(tensors[0])
    reason = f"{op_name(node)} with a fixed order"
    return c.broadcast([(c.axes(t), shape_of(t)) for t in tensors], shape_of(node), reason)


def prelu(c: Context, node: Node, a: Arguments) -> Axes:
    axes = list(c.axes(a["self"]))
    if shape_of(a["weight"]) != (1,):
        axes[1] = c.unify(axes[1], c.axes(a["weight"])[0], "prelu over a fixed order")
    return tuple(axes)


def reduction(c: Context, node: Node, a: Arguments) -> Strands | list[Strands]:
    """Sums, means and the like, which do not care in which order they see the units."""
    if a.get("other") is not None:  # torch.max(x, y)
        return pointwise(c, node, a)
    axes = c.axes(a["self"])
    gone = named_dims(a.get("dim"), len(axes))
    kept = tuple(None if i in gone else ids for i, ids in enumerate(axes) if a.get("keepdim") or i not in gone)
    values = node.meta["val"]
    several = isinstance(values, (tuple, list))
    if several or op_name(node).startswith("arg"):
        c.pin(tuple(axes[i] for i in gone), f"{op_name(node)} gives the numbers of units")
    return [kept for _ in values] if several else kept


def along(c: Context, node: Node, a: Arguments) -> Strands | list[Strands]:
    """Ops for which the order along some axes matters, and which do the same for each index of the others."""
    axes = c.axes(a["self"])
    dims = named_dims(a.get("dim", a.get("dims")), len(axes))
    c.pin(tuple(axes[i] for i in dims), f"{op_name(node)} goes along it")
    out = tuple(None if i in dims else ids for i, ids in enumerate(axes))
    values = node.meta["val"]
    return [out for _ in values] if isinstance(values, (tuple, list)) else out


def fixed(c: Context, node: Node, a: Arguments) -> Strands | list[Strands]:
    """Ops that look at the type or the size of a tensor, not at its elements."""
    return none_of(node)


def glu(c: Context, node: Node, a: Arguments) -> Axes:
    """Each unit of the first half goes with a unit of the second."""
    axes, dim = at(c, a)
    half = shape_of(a["self"])[dim] // 2
    one, other = (c.take(axes[dim], part) for part in (slice(half), slice(half, None)))
    return (*axes[:dim], c.unify(one, other, "glu with a fixed order"), *axes[dim + 1 :])


def triangle(c: Context, node: Node, a: Arguments) -> Axes:
    axes = c.axes(a["self"])
    c.pin(axes[-2:], f"{op_name(node)} cuts a corner off")
    return (*axes[:-2], None, None)
