"""What each ATen op does to the order of units: one table, `RULES`, from op name to rule.

A rule reads the axes of its inputs and returns those of its output (a list of them for an op with several outputs). An
op that is not in the table pins all it touches: it costs sharing, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from taskzip.graph._units import Ids
from taskzip.graph._values import Axes, Call, Context, shape_of
from taskzip.graph._views import reshaped

Rule = Callable[[Context, Node, dict[str, Any]], Axes | list[Axes]]


def apply_rule(c: Context, node: Node) -> Axes | list[Axes]:
    """The axes of what `node` computes."""
    name = op_name(node)
    rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if rule is not None:
        return rule(c, node, arguments(node))
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise(c, node, arguments(node))
    return _unknown(c, node, {})


def op_name(node: Node) -> str:
    """`conv2d` for `aten.conv2d.default`; the name of the function for what is no ATen op."""
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, _, name = node.target.name().partition("::")
        name = name.split(".")[0]
        return name if namespace == "aten" else f"{namespace}::{name}"
    return getattr(node.target, "__name__", str(node.target))


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an ATen call by their names in the schema, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}


def none_of(node: Node) -> Axes | list[Axes]:
    """Fixed axes, as many as the node's value has."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [(None,) * v.dim() if isinstance(v, torch.Tensor) else () for v in value]
    return (None,) * value.dim() if isinstance(value, torch.Tensor) else ()


# --- ops that touch every element alike ---------------------------------------------------------------------------


def _unknown(c: Context, node: Node, a: dict[str, Any]) -> Axes | list[Axes]:
    for source in node.all_input_nodes:
        c.pin_value(source, f"op {op_name(node)} is not known")
    return none_of(node)


def _same(c: Context, node: Node, a: dict[str, Any]) -> Axes:
    return c.axes(_first(node))


def _pointwise(c: Context, node: Node, a: dict[str, Any]) -> Axes:
    shape = shape_of(node)
    out: list[Ids | None] = [None] * len(shape)
    seen = [False] * len(shape)
    tensors = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), torch.Tensor)]
    for source in sorted(tensors, key=lambda source: source.op == "placeholder"):  # parameters lie along activations
        sizes = shape_of(source)
        for dim, size in enumerate(sizes):
            i = len(shape) - len(sizes) + dim
            if size == shape[i] > 1:  # not where one element is broadcast: that is the same for every unit
                out[i] = (
                    c.lay(source, dim, out[i], f"{op_name(node)} with a fixed order")
                    if seen[i]
                    else c.axes(source)[dim]
                )
                seen[i] = True
    return tuple(out)


def _reduction(c: Context, node: Node, a: dict[str, Any]) -> Axes | list[Axes]:
    """Sums, means and the like, which do not care in which order they see the units."""
    if a.get("other") is not None:  # torch.max(x, y)
        return _pointwise(c, node, a)
    axes = c.axes(a["self"])
    dims = a.get("dim")
    dims = range(len(axes)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {d % len(axes) for d in dims} if axes else set()
    if a.get("keepdim"):
        kept: Axes = tuple(None if i in gone else ids for i, ids in enumerate(axes))
    else:
        kept = tuple(ids for i, ids in enumerate(axes) if i not in gone)
    values = node.meta["val"]
    if isinstance(values, (tuple, list)):  # max with indices: an index along units names a unit
        c.pin(tuple(axes[i] for i in gone), f"{op_name(node)} gives indices of units")
        return [kept for _ in values]
    return kept


# --- views --------------------------------------------------------------------------------------------------------


def _view(c: Context, node: Node, a: dict[str, Any]) -> Axes:
    source = _first(node)
    return reshaped(c, c.axes(source), shape_of(source), shape_of(node), f"{op_name(node)} mixes units")


def _permute(c: Context, node: Node, a: dict[str, Any]) -> Axes:
    axes = c.axes(a["self"])
    return tuple(axes[d] for d in a["dims"])


def _transpose(c: Context, node: Node, a: dict[str, Any]) -> Axes:
    axes = list(c.axes(a["self"]))
    one, other = (a.get("dim0", 0), a.get("dim1", 1)) if len(axes) > 1 else (0, 0)
    axes[one], axes[other] = axes[other], axes[one]
    return tuple(axes)


def _expand(c: Context, node: Node, a: dict[str, Any]) -> Axes:
    axes, before, after = c.axes(a["self"]), shape_of(a["self"]), shape_of(node)
    new = len(after) - len(before)
    return (None,) * new + tuple(ids if s == t else None for ids, s, t in zip(axes, before, after[new:], strict=True))


def _slice(c: Context, node: Node, a: dict[str, Any]) -> Axes:
    axes = list(c.axes(a["self"]))
    dim = a["dim"] % len(axes)
    axes[dim] = c.take(axes[dim], slice(a["start"], a["end"], a["step"]), "a slice cuts a unit")
    return tuple(axes)


def _select(c: Context, node: Node, a: dict[str, Any]) -> Axes:
    axes = list(c.axes(a["self"]))
    dim = a["dim"] % len(axes)
    ids = axes.pop(dim)
    if ids is not None:
        c.units.pin(ids[[a["index"]]], "one unit is selected by its number")
    return tuple(axes)


def _split(c: Context, node: Node, a: dict[str, Any]) -> list[Axes]:
    axes = c.axes(a["self"])
    dim = a["dim"] % len(axes)
    parts: list[Axes] = []
    start = 0
    for part in node.meta["val"]:
        stop = start + int(part.shape[dim])
        ids = c.take(axes[dim], slice(start, stop), "a split cuts a unit")
        parts.append((*axes[:dim], ids, *axes[dim + 1 :]))
        start = stop
    return parts


def _getitem(c: Context, node: Node, a: dict[str, Any]) -> Axes:
    value = c.values[_first(node)]
    return value[int(node.args[1])].axes if isinstance(value, list) else none_of(node)  # type: ignore[arg-type,return-value]


# --- layers and what sits between them ----------------------------------------------------------------------------


def _linear(c: Context, node: Node, a: dict[str, Any]) -> Axes:
    axes = c.axes(a["input"])
    reads = c.lay(a["weight"], 1, axes[-1], "read in a fixed order")
    rows = _bias(c, c.rows(a["weight"]), a["bias"])
    _record(c, node, a, "linear", reads, groups=1)
    return (*axes[:-1], rows)


def _convolution(c: Context, node: Node, a: dict[str, Any]) -> Axes:
    source, weight, groups = c.axes(a["input"]), a["weight"], a["groups"]
    channel = _slide(c, source, weight)
    units, inputs = shape_of(weight)[0], shape_of(a["input"])[channel]
    reads = source[channel]
    if groups == 1:
        reads = c.lay(weight, 1, reads, "read in a fixed order")
        rows = c.rows(weight)
    elif groups == inputs:  # depthwise: each input unit has units // groups rows of its own
        rows = c.lay(
            weight,
            0,
            None if reads is None else reads.repeat(units // groups),
            "depthwise over a fixed order",
        )
    else:
        rows = _fixed_groups(c, weight, reads)
    rows = _bias(c, rows, a["bias"])
    _record(c, node, a, f"conv{len(source) - channel - 1}d", reads, groups)
    return (*source[:channel], rows, *[None] * (len(source) - channel - 1))


def _transposed_convolution(c: Context, node: Node, a: dict[str, Any]) -> Axes:
    source, weight = c.axes(a["input"]), a["weight"]
    channel = _slide(c, source, weight)
    if a["groups"] == 1:
        c.lay(weight, 0, source[channel], "read in a fixed order")
        rows = c.rows(weight, 1)
    else:
        rows = _fixed_groups(c, weight, source[channel])
    rows = _bias(c, rows, a["bias"])
    return (*source[:channel], rows, *[None] * (len(source) - channel - 1))


def _slide(c: Context, source: Axes, weight: Node) -> int:
    """Pin the taps of the kernel and the axes along which it slides; returns the axis of the channels."""
    taps = range(2, len(shape_of(weight)))
    channel = len(source) - len(taps) - 1
    c.pin(tuple(c.rows(weight, dim) for dim in taps), "the taps of a kernel")
    c.pin(source[channel + 1 :], "a convolution slides along it")
    return channel


def _fixed_groups(c: Context, weight: Node, reads: Ids | None) -> None:
    c.pin((c.rows(weight, 0), c.rows(weight, 1), reads), "a grouped convolution")


def _batch_norm(c: Context, node: Node, a: dict[str, Any]) -> Axes:
    axes = list(c.axes(a["input"]))
    for name in ("weight", "bias", "running_mean", "running_var"):
        if a[name] is not None:
            axes[1] = c.lay(a[name], 0, axes[1], "batch-norm over a fixed order")
    c.followed_by[a["input"]] = node
    return tuple(axes)


def _layer_norm(c: Context, node: Node, a: dict[str, Any]) -> Axes:
    axes = list(c.axes(a["input"]))
    for name in ("weight", "bias"):
        if a[name] is not None:
            for dim, i in enumerate(range(len(axes) - len(a["normalized_shape"]), len(axes))):
                axes[i] = c.lay(a[name], dim, axes[i], "layer-norm over a fixed order")
    return tuple(axes)


def _spatial(c: Context, node: Node, a: dict[str, Any]) -> Axes | list[Axes]:
    """Pooling and resizing: along the last one, two or three axes (the digit in the op's name), the same for each channel."""
    source = _first(node)
    axes = c.axes(source)
    dims = int(next(ch for ch in op_name(node) if ch.isdigit()))
    c.pin(axes[len(axes) - dims :], f"{op_name(node)} slides along it")
    out = (*axes[: len(axes) - dims], *[None] * dims)
    value = node.meta["val"]
    return [out for _ in value] if isinstance(value, (tuple, list)) else out


def _pad(c: Context, node: Node, a: dict[str, Any]) -> Axes:
    axes = c.axes(a["self"])
    padded = len(a["pad"]) // 2
    touched = [i for i in range(len(axes)) if i >= len(axes) - padded]
    moved = [i for i in touched if shape_of(node)[i] != shape_of(a["self"])[i]]
    c.pin(tuple(axes[i] for i in moved), "padding along units")
    return tuple(None if i in moved else ids for i, ids in enumerate(axes))


def _cat(c: Context, node: Node, a: dict[str, Any]) -> Axes:
    sources: Sequence[Node] = a["tensors"]
    axes = list(c.axes(sources[0]))
    dim = a["dim"] % len(axes)
    for source in sources[1:]:
        for i, ids in enumerate(c.axes(source)):
            if i != dim:
                axes[i] = c.unify(axes[i], ids, "concatenated with a fixed order")
    parts = [c.axes(source)[dim] for source in sources]
    if any(ids is not None for ids in parts):
        known = [c.known(ids, shape_of(s)[dim], "fixed") for ids, s in zip(parts, sources, strict=True)]
        axes[dim] = np.concatenate(known)
    return tuple(axes)


def _embedding(c: Context, node: Node, a: dict[str, Any]) -> Axes:
    c.pin((c.rows(a["weight"], 0),), "rows of an embedding are chosen by number")
    return (*[None] * len(c.axes(a["indices"])), c.rows(a["weight"], 1))


# --- helpers ------------------------------------------------------------------------------------------------------


def _first(node: Node) -> Node:
    assert isinstance(node.args[0], Node)
    return node.args[0]


def _bias(c: Context, rows: Ids | None, bias: Node | None) -> Ids | None:
    return rows if bias is None else c.lay(bias, 0, rows, "the bias of a fixed layer")


def _record(c: Context, node: Node, a: dict[str, Any], kind: str, reads: Ids | None, groups: int) -> None:
    value = c.values[a["input"]]
    raw = not isinstance(value, list) and value.raw
    c.calls.append(Call(node, kind, a["weight"], a["bias"], reads, raw, groups))


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_table(_linear, "linear"),
    **_table(_convolution, "conv1d conv2d conv3d"),
    **_table(_transposed_convolution, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_table(_batch_norm, "batch_norm"),
    **_table(_layer_norm, "layer_norm"),
    **_table(_embedding, "embedding"),
    **_table(_cat, "cat concat concatenate"),
    **_table(_pad, "pad constant_pad_nd reflection_pad2d replication_pad2d"),
    **_table(_spatial, "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d"),
    **_table(_spatial, "max_pool2d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    **_table(_spatial, "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    **_table(
        _spatial,
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d",
    ),
    **_table(_same, "dropout feature_dropout alpha_dropout feature_alpha_dropout contiguous clone detach alias"),
    **_table(_same, "_to_copy to type_as lift_fresh lift_fresh_copy softmax log_softmax _softmax _log_softmax"),
    **_table(_reduction, "mean sum amax amin max min var std logsumexp prod norm linalg_vector_norm"),
    **_table(_view, "view reshape flatten unflatten _unsafe_view squeeze unsqueeze view_copy ravel"),
    **_table(_permute, "permute"),
    **_table(_transpose, "transpose t swapaxes"),
    **_table(_expand, "expand expand_as"),
    **_table(_slice, "slice narrow_copy"),
    **_table(_select, "select"),
    **_table(_split, "split split_with_sizes chunk"),
    **_table(_getitem, "getitem"),
}
