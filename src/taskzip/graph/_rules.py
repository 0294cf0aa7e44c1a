"""What each ATen op does to the order of units: one table, `RULES`, from op name to rule.

A rule reads the axes of its inputs and returns those of its output (a list of them for an op with several outputs). An
op that is not in the table pins all it touches: it costs sharing, never correctness.

An op that writes into a view of another tensor needs no special care: what it writes is laid along the units of the
view, or these are pinned, and they are the very units of the tensor behind it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from taskzip.graph._units import Ids
from taskzip.graph._values import Axes, Call, Context, flat, shape_of
from taskzip.graph._views import reshaped

Arguments = dict[str, Any]
Rule = Callable[[Context, Node, Arguments], Axes | list[Axes]]


def apply_rule(c: Context, node: Node) -> Axes | list[Axes]:
    """The axes of what `node` computes."""
    if node.target is operator.getitem:
        return _getitem(c, node)
    rule = _rule_of(node)
    if rule is None:
        return _unknown(c, node, f"op {op_name(node)} is not known")
    if not all(_has_numbers_for_sizes(each) for each in (node, *node.all_input_nodes)):
        return _unknown(c, node, f"the data decide on sizes in op {op_name(node)}")
    return rule(c, node, arguments(node))


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


def none_of(node: Node) -> Axes | list[Axes]:
    """Fixed axes, as many as the node's value has."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [(None,) * v.dim() if isinstance(v, Tensor) else () for v in value]
    return (None,) * value.dim() if isinstance(value, Tensor) else ()


def _rule_of(node: Node) -> Rule | None:
    if not isinstance(node.target, torch._ops.OpOverload) or any(a.is_out for a in node.target._schema.arguments):
        return None
    name = op_name(node)
    rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
    return rule or (_pointwise if _is_pointwise(node) else None)


def _is_pointwise(node: Node) -> bool:
    """Whether torch says so, of this op or, where it forgot the tag, of its functional twin."""
    packet = getattr(torch.ops.aten, op_name(node).removesuffix("_"), None)
    twins = [] if packet is None else [getattr(packet, name) for name in packet.overloads()]
    tagged = any(torch.Tag.pointwise in op.tags for op in (node.target, *twins))
    return tagged and isinstance(node.meta["val"], Tensor)


def _has_numbers_for_sizes(node: Node) -> bool:
    value = node.meta.get("val")
    each = value if isinstance(value, (tuple, list)) else [value]
    symbols = (torch.SymInt, torch.SymFloat, torch.SymBool)
    return not any(isinstance(s, symbols) for v in each for s in (v.shape if isinstance(v, Tensor) else [v]))


def _unknown(c: Context, node: Node, reason: str) -> Axes | list[Axes]:
    for source in node.all_input_nodes:
        c.pin_value(source, reason)
    return none_of(node)


def _getitem(c: Context, node: Node) -> Axes | list[Axes]:
    source, index = node.args
    value = c.values[source]  # type: ignore[index]
    return value[index].axes if isinstance(value, list) else none_of(node)  # type: ignore[index]


# --- ops that touch every element alike ---------------------------------------------------------------------------


def _same(c: Context, node: Node, a: Arguments) -> Axes:
    return c.axes(_first(a))


def _pointwise(c: Context, node: Node, a: Arguments) -> Axes:
    tensors = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
    reason = f"{op_name(node)} with a fixed order"
    return c.broadcast([(c.axes(t), shape_of(t)) for t in tensors], shape_of(node), reason)


def _prelu(c: Context, node: Node, a: Arguments) -> Axes:
    axes = list(c.axes(a["self"]))
    if shape_of(a["weight"]) != (1,):
        axes[1] = c.unify(axes[1], c.axes(a["weight"])[0], "prelu over a fixed order")
    return tuple(axes)


def _reduction(c: Context, node: Node, a: Arguments) -> Axes | list[Axes]:
    """Sums, means and the like, which do not care in which order they see the units."""
    if a.get("other") is not None:  # torch.max(x, y)
        return _pointwise(c, node, a)
    axes = c.axes(a["self"])
    gone = _dims(a.get("dim"), len(axes))
    kept = tuple(None if i in gone else ids for i, ids in enumerate(axes) if a.get("keepdim") or i not in gone)
    values = node.meta["val"]
    several = isinstance(values, (tuple, list))
    if several or op_name(node).startswith("arg"):
        c.pin(tuple(axes[i] for i in gone), f"{op_name(node)} gives the numbers of units")
    return [kept for _ in values] if several else kept


def _along(c: Context, node: Node, a: Arguments) -> Axes | list[Axes]:
    """Ops for which the order along some axes matters, and which do the same for each index of the others."""
    axes = c.axes(a["self"])
    dims = _dims(a.get("dim", a.get("dims")), len(axes))
    c.pin(tuple(axes[i] for i in dims), f"{op_name(node)} goes along it")
    out = tuple(None if i in dims else ids for i, ids in enumerate(axes))
    values = node.meta["val"]
    return [out for _ in values] if isinstance(values, (tuple, list)) else out


def _fixed(c: Context, node: Node, a: Arguments) -> Axes | list[Axes]:
    """Ops that look at the type or the size of a tensor, not at its elements."""
    return none_of(node)


# --- views and copies ---------------------------------------------------------------------------------------------


def _view(c: Context, node: Node, a: Arguments) -> Axes:
    source = _first(a)
    return reshaped(c, c.axes(source), shape_of(source), shape_of(node), f"{op_name(node)} mixes units")


def _permute(c: Context, node: Node, a: Arguments) -> Axes:
    """The op itself says where each axis goes, by what it does to a tensor whose axes all differ in size."""
    assert callable(node.target)
    axes = c.axes(_first(a))
    probe = torch.empty([2 + i for i in range(len(axes))], device="meta")
    return tuple(axes[size - 2] for size in node.target(probe, *node.args[1:], **node.kwargs).shape)


def _expand(c: Context, node: Node, a: Arguments) -> Axes:
    """Where one element is spread over an axis, its copies may change places."""
    source, shape = a["self"], shape_of(node)
    before = (1,) * (len(shape) - len(shape_of(source))) + shape_of(source)
    axes = (None,) * (len(shape) - len(shape_of(source))) + c.axes(source)
    if all(value.raw for value in flat(c.values[source])):  # inputs stay in a fixed order
        return axes
    spread = (s == 1 < t for s, t in zip(before, shape, strict=True))
    return tuple(c.units.fresh(t) if new else ids for new, ids, t in zip(spread, axes, shape, strict=True))


def _repeat(c: Context, node: Node, a: Arguments) -> Axes:
    axes, repeats = c.axes(a["self"]), a["repeats"]
    new = len(repeats) - len(axes)
    kept = (None if ids is None else np.tile(ids, n) for ids, n in zip(axes, repeats[new:], strict=True))
    return (None,) * new + tuple(kept)


def _slice(c: Context, node: Node, a: Arguments) -> Axes:
    axes, dim = _at(c, a)
    return (*axes[:dim], c.take(axes[dim], slice(a["start"], a["end"], a["step"])), *axes[dim + 1 :])


def _select(c: Context, node: Node, a: Arguments) -> Axes:
    axes, dim = _at(c, a)
    c.take(axes[dim], [a["index"]])
    return (*axes[:dim], *axes[dim + 1 :])


def _unbind(c: Context, node: Node, a: Arguments) -> list[Axes]:
    axes, dim = _at(c, a)
    c.pin((axes[dim],), "unbind takes units one by one")
    return [(*axes[:dim], *axes[dim + 1 :]) for _ in node.meta["val"]]


def _split(c: Context, node: Node, a: Arguments) -> list[Axes]:
    axes, dim = _at(c, a)
    parts: list[Axes] = []
    start = 0
    for part in node.meta["val"]:
        stop = start + int(part.shape[dim])
        parts.append((*axes[:dim], c.take(axes[dim], slice(start, stop)), *axes[dim + 1 :]))
        start = stop
    return parts


def _cat(c: Context, node: Node, a: Arguments) -> Axes:
    sources: Sequence[Node] = [source for source in a["tensors"] if shape_of(source) != (0,)]  # torch skips these too
    axes = [c.axes(source) for source in sources]
    dim = a["dim"] % len(axes[0])
    out = _unify_all(c, [(*each[:dim], None, *each[dim + 1 :]) for each in axes], "concatenated with a fixed order")
    sizes = [shape_of(source)[dim] for source in sources]
    whole = c.join([each[dim] for each in axes], sizes, "a fixed part of an axis")
    return (*out[:dim], whole, *out[dim + 1 :])


def _stack(c: Context, node: Node, a: Arguments) -> Axes:
    out = _unify_all(c, [c.axes(source) for source in a["tensors"]], "stacked with a fixed order")
    dim = a["dim"] % (len(out) + 1)
    return (*out[:dim], None, *out[dim:])


def _pad(c: Context, node: Node, a: Arguments) -> Axes:
    axes = list(c.axes(a["self"]))
    before, pads = shape_of(a["self"]), a["pad"]
    constant = a.get("mode", "constant") == "constant" and min(pads) >= 0
    for i, low, high in zip(reversed(range(len(axes))), pads[::2], pads[1::2], strict=False):
        if low == high == 0:
            continue
        if constant:
            axes[i] = c.join([None, axes[i], None], [low, before[i], high], "padding")
        else:
            c.pin((axes[i],), "padding along units")
            axes[i] = None
    return tuple(axes)


# --- layers and what sits between them ----------------------------------------------------------------------------


def _linear(c: Context, node: Node, a: Arguments) -> Axes | list[Axes]:
    axes, weight = c.axes(a["input"]), c.axes(a["weight"])
    if len(weight) != 2:
        return _unknown(c, node, "a linear layer without an axis of units")
    reads = c.unify(axes[-1], weight[1], "read in a fixed order")
    _record(c, node, a, "linear", reads, groups=1)
    return (*axes[:-1], _with_bias(c, weight[0], a))


def _convolution(c: Context, node: Node, a: Arguments) -> Axes:
    axes, weight, groups = c.axes(a["input"]), c.axes(a["weight"]), a["groups"]
    channel = _slide(c, axes, weight)
    reads, rows = axes[channel], weight[0]
    if groups == 1:
        reads = c.unify(reads, weight[1], "read in a fixed order")
    elif groups == shape_of(a["input"])[channel]:  # depthwise: each input unit has rows of its own
        multiplier = shape_of(a["weight"])[0] // groups
        rows = c.unify(None if reads is None else reads.repeat(multiplier), rows, "depthwise over a fixed order")
    else:
        rows = None
        c.pin((*weight, reads), "a grouped convolution")
    _record(c, node, a, f"conv{len(weight) - 2}d", reads, groups)
    return (*axes[:channel], _with_bias(c, rows, a), *[None] * (len(weight) - 2))


def _transposed_convolution(c: Context, node: Node, a: Arguments) -> Axes:
    axes, weight = c.axes(a["input"]), c.axes(a["weight"])
    channel = _slide(c, axes, weight)
    if a["groups"] == 1:
        c.unify(axes[channel], weight[0], "read in a fixed order")
        rows = weight[1]
    else:
        rows = None
        c.pin((*weight, axes[channel]), "a grouped convolution")
    return (*axes[:channel], _with_bias(c, rows, a), *[None] * (len(weight) - 2))


def _slide(c: Context, axes: Axes, weight: Axes) -> int:
    """Pin the taps of the kernel and the axes along which it slides; returns the axis of the channels."""
    channel = len(axes) - (len(weight) - 2) - 1
    c.pin(weight[2:], "the taps of a kernel")
    c.pin(axes[channel + 1 :], "a convolution slides along it")
    return channel


def _with_bias(c: Context, rows: Ids | None, a: Arguments) -> Ids | None:
    return rows if a["bias"] is None else c.unify(rows, c.axes(a["bias"])[0], "the bias of a fixed layer")


def _record(c: Context, node: Node, a: Arguments, kind: str, reads: Ids | None, groups: int) -> None:
    value = c.values[a["input"]]
    raw = not isinstance(value, list) and value.raw
    c.calls.append(Call(node, kind, a["weight"], a["bias"], reads, raw, groups))


def _matmul(c: Context, node: Node, a: Arguments) -> Axes:
    """[*, n, k] @ [*, k, m]: a sum over k; a vector has no n or m."""
    (left, left_shape), (right, right_shape) = ((c.axes(t), shape_of(t)) for t in list(a.values())[:2])
    reason = f"{op_name(node)} with a fixed order"
    c.unify(left[-1], right[max(0, len(right) - 2)], reason)
    kept = (*left[-2:-1], *(right[-1:] if len(right) > 1 else ()))
    batch = [(left[:-2], left_shape[:-2]), (right[:-2], right_shape[:-2])]
    shape = shape_of(node)
    return c.broadcast(batch, shape[: len(shape) - len(kept)], reason) + kept


def _batch_norm(c: Context, node: Node, a: Arguments) -> Axes:
    c.norms[a["input"]] = node
    return _norm_of_each(c, node, a)


def _norm_of_each(c: Context, node: Node, a: Arguments) -> Axes:
    """Channels, on axis 1, are normalised one by one."""
    axes = list(c.axes(_first(a)))
    for name in ("weight", "bias", "running_mean", "running_var"):
        if a.get(name) is not None:
            axes[1] = c.unify(axes[1], c.axes(a[name])[0], f"{op_name(node)} over a fixed order")
    return tuple(axes)


def _group_norm(c: Context, node: Node, a: Arguments) -> Axes:
    """Only channels of the same group are alike."""
    channels, groups = c.axes(a["input"])[1], a["num_groups"]
    size = shape_of(a["input"])[1] // groups
    for group in range(groups):
        c.take(channels, slice(group * size, (group + 1) * size))
    return _norm_of_each(c, node, a)


def _layer_norm(c: Context, node: Node, a: Arguments) -> Axes:
    axes = list(c.axes(a["input"]))
    for name in ("weight", "bias"):
        if a.get(name) is not None:
            own = c.axes(a[name])
            for i, ids in enumerate(own, start=len(axes) - len(own)):
                if ids is not None or axes[i] is not None:
                    axes[i] = c.unify(axes[i], ids, f"{op_name(node)} over a fixed order")
    return tuple(axes)


def _spatial(c: Context, node: Node, a: Arguments) -> Axes | list[Axes]:
    """Pooling and resizing: along as many of the last axes as the op's name says, the same for each channel."""
    axes = c.axes(_first(a))
    slides = len(axes) - int(next(ch for ch in op_name(node) if ch.isdigit()))
    c.pin(axes[slides:], f"{op_name(node)} slides along it")
    out = (*axes[:slides], *[None] * (len(axes) - slides))
    values = node.meta["val"]
    return [out for _ in values] if isinstance(values, (tuple, list)) else out


def _embedding(c: Context, node: Node, a: Arguments) -> Axes:
    rows, columns = c.axes(a["weight"])
    c.pin((rows,), "rows of an embedding are chosen by number")
    return (*c.axes(a["indices"]), columns)


# --- helpers ------------------------------------------------------------------------------------------------------


def _first(a: Arguments) -> Node:
    source = next(iter(a.values()))
    assert isinstance(source, Node)
    return source


def _at(c: Context, a: Arguments) -> tuple[Axes, int]:
    """The axes of the first argument, and the one that `dim` names."""
    axes = c.axes(_first(a))
    return axes, a["dim"] % len(axes)


def _dims(dim: int | Sequence[int] | None, count: int) -> set[int]:
    """The axes that an argument `dim` names; all of them for none."""
    dims = range(count) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return {d % count for d in dims} if count else set()


def _unify_all(c: Context, several: Sequence[Axes], reason: str) -> Axes:
    out = list(several[0])
    for axes in several[1:]:
        out = [one if one is other else c.unify(one, other, reason) for one, other in zip(out, axes, strict=True)]
    return tuple(out)


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_table(_linear, "linear"),
    **_table(_convolution, "conv1d conv2d conv3d"),
    **_table(_transposed_convolution, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_table(_matmul, "matmul mm bmm"),
    **_table(_batch_norm, "batch_norm"),
    **_table(_norm_of_each, "instance_norm"),
    **_table(_group_norm, "group_norm"),
    **_table(_layer_norm, "layer_norm rms_norm"),
    **_table(_embedding, "embedding"),
    **_table(_cat, "cat concat concatenate"),
    **_table(_stack, "stack"),
    **_table(_pad, "pad constant_pad_nd"),
    **_table(_spatial, "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices"),
    **_table(_spatial, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    **_table(_spatial, "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    **_table(_spatial, "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d"),
    **_table(_spatial, "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d"),
    **_table(_same, "dropout feature_dropout alpha_dropout feature_alpha_dropout contiguous clone detach alias"),
    **_table(_same, "_to_copy to type_as lift_fresh lift_fresh_copy softmax log_softmax _softmax _log_softmax"),
    **_table(_same, "zeros_like ones_like full_like empty_like"),
    **_table(_pointwise, "hardswish log_sigmoid rrelu copy fill zero multiply divide subtract"),
    **_table(_prelu, "prelu"),
    **_table(_reduction, "mean sum amax amin max min var std logsumexp prod norm linalg_vector_norm argmax argmin"),
    **_table(_along, "cumsum cumprod flip roll sort"),
    **_table(_fixed, "_assert_tensor_metadata _assert_scalar new_zeros new_ones new_full new_empty"),
    **_table(_view, "view reshape view_as reshape_as flatten unflatten squeeze unsqueeze ravel _unsafe_view"),
    **_table(_permute, "permute transpose t mT mH adjoint numpy_T swapaxes swapdims movedim moveaxis"),
    **_table(_expand, "expand expand_as"),
    **_table(_repeat, "repeat"),
    **_table(_slice, "slice"),
    **_table(_select, "select"),
    **_table(_unbind, "unbind"),
    **_table(_split, "split split_with_sizes chunk tensor_split"),
}
