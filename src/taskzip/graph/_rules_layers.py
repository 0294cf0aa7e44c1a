"""Rules for layers and what sits between them: products, attention, norms, pooling, embeddings."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from taskzip.graph._nodes import Arguments, first, op_name, unknown
from taskzip.graph._units import Ids
from taskzip.graph._values import Axes, Call, Context, Strands, shape_of


def linear(c: Context, node: Node, a: Arguments) -> Strands | list[Strands]:
    axes, weight = c.axes(a["input"]), c.axes(a["weight"])
    if len(weight) != 2:
        return unknown(c, node, "a linear layer without an axis of units")
    reads = c.unify(axes[-1], weight[1], "read in a fixed order")
    _record(c, node, a, "linear", reads, axes[:-1], groups=1)
    return (*axes[:-1], _with_bias(c, weight[0], a))


def convolution(c: Context, node: Node, a: Arguments) -> Axes:
    axes, weight, groups = c.axes(a["input"]), c.axes(a["weight"]), a["groups"]
    channel = _slide(c, axes, weight)
    reads, rows = axes[channel], weight[0]
    if groups == 1:
        reads = c.unify(reads, weight[1], "read in a fixed order")
    else:
        c.pin(weight[1:2], "the inputs of a group")
        rows = _tied(c, reads, rows, groups, shape_of(node)[channel])
    _record(c, node, a, f"conv{len(weight) - 2}d", reads, axes[:channel], groups)
    return (*axes[:channel], _with_bias(c, rows, a), *[None] * (len(weight) - 2))


def transposed_convolution(c: Context, node: Node, a: Arguments) -> Axes:
    axes, weight = c.axes(a["input"]), c.axes(a["weight"])
    channel = _slide(c, axes, weight)
    reads, rows, groups = axes[channel], weight[1], a["groups"]
    c.unify(reads, weight[0], "read in a fixed order")
    if groups > 1:
        c.pin(weight[1:2], "the units of a group")
        rows = None if reads is None else c.units.fuse(reads, groups).repeat(shape_of(a["weight"])[1])
    return (*axes[:channel], _with_bias(c, rows, a), *[None] * (len(weight) - 2))


def _tied(c: Context, reads: Ids | None, rows: Ids | None, groups: int, count: int) -> Ids | None:
    """Each group of inputs is one unit, and so are the `count / groups` rows that read it."""
    units = None if reads is None else c.units.fuse(reads, groups).repeat(count // groups)
    return c.unify(units, rows, "groups over a fixed order")


def _slide(c: Context, axes: Axes, weight: Axes) -> int:
    """Pin the taps of the kernel and the axes along which it slides; returns the axis of the channels."""
    channel = len(axes) - (len(weight) - 2) - 1
    c.pin(weight[2:], "the taps of a kernel")
    c.pin(axes[channel + 1 :], "a convolution slides along it")
    return channel


def _with_bias(c: Context, rows: Ids | None, a: Arguments) -> Ids | None:
    return rows if a["bias"] is None else c.unify(rows, c.axes(a["bias"])[0], "the bias of a fixed layer")


def _record(c: Context, node: Node, a: Arguments, kind: str, reads: Ids | None, others: Axes, groups: int) -> None:
    value = c.values[a["input"]]
    raw = not isinstance(value, list) and value.raw
    beside = tuple(ids for ids in others if ids is not None)
    c.calls.append(Call(node, kind, a["weight"], a["bias"], reads, beside, raw, groups))


def matmul(c: Context, node: Node, a: Arguments) -> Axes:
    """[*, n, k] @ [*, k, m]: a sum over k; a vector has no n or m."""
    one, other, *_ = a.values()
    return _product(c, node, one, other)


def addmm(c: Context, node: Node, a: Arguments) -> Axes:
    summand, one, other, *_ = a.values()
    shape = shape_of(node)
    terms = [(_product(c, node, one, other), shape), (c.axes(summand), shape_of(summand))]
    return c.broadcast(terms, shape, f"{op_name(node)} with a fixed order")


def _product(c: Context, node: Node, one: Node, other: Node) -> Axes:
    (left, left_shape), (right, right_shape) = ((c.axes(t), shape_of(t)) for t in (one, other))
    reason = f"{op_name(node)} with a fixed order"
    c.unify(left[-1], right[max(0, len(right) - 2)], reason)
    kept = (*left[-2:-1], *(right[-1:] if len(right) > 1 else ()))
    batch = [(left[:-2], left_shape[:-2]), (right[:-2], right_shape[:-2])]
    shape = shape_of(node)
    return c.broadcast(batch, shape[: len(shape) - len(kept)], reason) + kept


def einsum(c: Context, node: Node, a: Arguments) -> Strands | list[Strands]:
    """Axes with the same letter are in the same order; an order is all that a sum does not care about."""
    terms, arrow, result = a["equation"].replace(" ", "").partition("->")
    terms = terms.split(",")
    if not arrow or "." in result or any("." in term or len(set(term)) < len(term) for term in terms):
        return unknown(c, node, "einsum with more than letters once per tensor")
    found: dict[str, Ids | None] = {}
    for term, source in zip(terms, a["tensors"], strict=True):
        for letter, ids, size in zip(term, c.axes(source), shape_of(source), strict=True):
            if size > 1:
                found[letter] = c.unify(found[letter], ids, "einsum with a fixed order") if letter in found else ids
    return tuple(found.get(letter) for letter in result)


def attention(c: Context, node: Node, a: Arguments) -> Strands | list[Strands]:
    """softmax(q k' + mask) v: q [*, L, E], k [*, S, E], v [*, S, F], mask [*, L, S]; sums over E and S."""
    if a["enable_gqa"]:
        return unknown(c, node, "heads that share keys")
    q, k, v = (c.axes(a[name]) for name in ("query", "key", "value"))
    q_shape, k_shape, v_shape = (shape_of(a[name]) for name in ("query", "key", "value"))
    reason = "attention with a fixed order"
    c.unify(q[-1], k[-1], reason)
    scores = [
        ((*q[:-1], None), (*q_shape[:-1], 1)),
        ((*k[:-2], None, k[-2]), (*k_shape[:-2], 1, k_shape[-2])),
        ((*v[:-2], None, v[-2]), (*v_shape[:-2], 1, v_shape[-2])),
    ]
    if a["attn_mask"] is not None:
        scores.append((c.axes(a["attn_mask"]), shape_of(a["attn_mask"])))
    out = c.broadcast(scores, (*shape_of(node)[:-1], k_shape[-2]), reason)
    if a["is_causal"]:
        c.pin(out[-2:], "attention to earlier places")
        out = (*out[:-2], None, None)
    return (*out[:-1], v[-1])


def batch_norm(c: Context, node: Node, a: Arguments) -> Axes:
    c.norms[a["input"]] = node
    return norm_of_each(c, node, a)


def norm_of_each(c: Context, node: Node, a: Arguments) -> Axes:
    """Channels, on axis 1, are normalised one by one."""
    axes = list(c.axes(first(a)))
    for name in ("weight", "bias", "running_mean", "running_var"):
        if a.get(name) is not None:
            axes[1] = c.unify(axes[1], c.axes(a[name])[0], f"{op_name(node)} over a fixed order")
    return tuple(axes)


def group_norm(c: Context, node: Node, a: Arguments) -> Axes:
    """Channels of the same group keep together."""
    channels, groups = c.axes(a["input"])[1], a["num_groups"]
    if channels is not None:
        c.units.keep_together(channels, np.arange(groups).repeat(len(channels) // groups))
    return norm_of_each(c, node, a)


def layer_norm(c: Context, node: Node, a: Arguments) -> Axes:
    axes = list(c.axes(a["input"]))
    for name in ("weight", "bias"):
        if a.get(name) is not None:
            own = c.axes(a[name])
            for i, ids in enumerate(own, start=len(axes) - len(own)):
                if ids is not None or axes[i] is not None:
                    axes[i] = c.unify(axes[i], ids, f"{op_name(node)} over a fixed order")
    return tuple(axes)


def spatial(c: Context, node: Node, a: Arguments) -> Strands | list[Strands]:
    """Pooling and resizing: along as many of the last axes as the op's name says, the same for each channel."""
    axes = c.axes(first(a))
    slides = len(axes) - int(next(ch for ch in op_name(node) if ch.isdigit()))
    c.pin(axes[slides:], f"{op_name(node)} slides along it")
    out = (*axes[:slides], *[None] * (len(axes) - slides))
    values = node.meta["val"]
    return [out for _ in values] if isinstance(values, (tuple, list)) else out


def embedding(c: Context, node: Node, a: Arguments) -> Axes:
    rows, columns = c.axes(a["weight"])
    c.pin((rows,), "rows of an embedding are chosen by number")
    return (*c.axes(a["indices"]), columns)
