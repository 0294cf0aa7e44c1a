"""What each ATen op does to the order of units: one table, `RULES`, from op name to rule.

A rule reads the axes of its inputs and returns those of its output (a list of them for an op with several outputs). An
op that is not in the table pins all it touches: it costs sharing, never correctness.

An op that writes into a view of another tensor needs no special care: what it writes is laid along the units of the
view, or these are pinned, and they are the very units of the tensor behind it.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Node

from taskzip.graph import _rules_elements as elements
from taskzip.graph import _rules_layers as layers
from taskzip.graph import _rules_views as views
from taskzip.graph._nodes import Rule, arguments, none_of, op_name, unknown
from taskzip.graph._values import Context, Strands


def apply_rule(c: Context, node: Node) -> Strands | list[Strands]:
    """The axes of what `node` computes."""
    if node.target is operator.getitem:
        return _getitem(c, node)
    rule = _rule_of(node)
    if rule is None:
        return unknown(c, node, f"op {op_name(node)} is not known")
    if not all(_has_numbers_for_sizes(each) for each in (node, *node.all_input_nodes)):
        return unknown(c, node, f"the data decide on sizes in op {op_name(node)}")
    return rule(c, node, arguments(node))


def _rule_of(node: Node) -> Rule | None:
    if not isinstance(node.target, torch._ops.OpOverload) or any(a.is_out for a in node.target._schema.arguments):
        return None
    name = op_name(node)
    rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
    return rule or (elements.pointwise if _is_pointwise(node) else None)


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


def _getitem(c: Context, node: Node) -> Strands | list[Strands]:
    source, index = node.args
    value = c.values[source]  # type: ignore[index]
    return value[index].axes if isinstance(value, list) else none_of(node)  # type: ignore[index]


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_table(layers.linear, "linear"),
    **_table(layers.convolution, "conv1d conv2d conv3d"),
    **_table(layers.transposed_convolution, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_table(layers.matmul, "matmul mm bmm"),
    **_table(layers.addmm, "addmm baddbmm"),
    **_table(layers.einsum, "einsum"),
    **_table(layers.attention, "scaled_dot_product_attention"),
    **_table(layers.batch_norm, "batch_norm"),
    **_table(layers.norm_of_each, "instance_norm"),
    **_table(layers.group_norm, "group_norm"),
    **_table(layers.layer_norm, "layer_norm rms_norm"),
    **_table(layers.embedding, "embedding"),
    **_table(views.cat, "cat concat concatenate"),
    **_table(views.stack, "stack"),
    **_table(views.pad, "pad constant_pad_nd"),
    **_table(
        layers.spatial, "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices"
    ),
    **_table(layers.spatial, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    **_table(layers.spatial, "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    **_table(layers.spatial, "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d"),
    **_table(layers.spatial, "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d"),
    **_table(
        elements.same, "dropout feature_dropout alpha_dropout feature_alpha_dropout contiguous clone detach alias"
    ),
    **_table(elements.same, "_to_copy to type_as lift_fresh lift_fresh_copy"),
    **_table(elements.softmax, "softmax log_softmax _softmax _log_softmax"),
    **_table(elements.same, "zeros_like ones_like full_like empty_like"),
    **_table(elements.pointwise, "hardswish log_sigmoid rrelu copy fill zero multiply divide subtract"),
    **_table(elements.prelu, "prelu"),
    **_table(elements.glu, "glu"),
    **_table(
        elements.reduction, "mean sum amax amin max min var std logsumexp prod norm linalg_vector_norm argmax argmin"
    ),
    **_table(elements.along, "cumsum cumprod flip roll sort"),
    **_table(elements.triangle, "tril triu"),
    **_table(elements.fixed, "_assert_tensor_metadata _assert_scalar new_zeros new_ones new_full new_empty"),
    **_table(views.view, "view reshape view_as reshape_as flatten unflatten squeeze unsqueeze ravel _unsafe_view"),
    **_table(views.permute, "permute transpose t mT mH adjoint numpy_T swapaxes swapdims movedim moveaxis"),
    **_table(views.expand, "expand expand_as"),
    **_table(views.repeat, "repeat"),
    **_table(views.sliced, "slice"),
    **_table(views.select, "select"),
    **_table(views.unbind, "unbind"),
    **_table(views.split, "split split_with_sizes chunk tensor_split"),
    **_table(views.index, "index"),
    **_table(views.index_select, "index_select"),
    **_table(views.gather, "gather"),
    **_table(views.channel_shuffle, "channel_shuffle native_channel_shuffle"),
    **_table(views.pixel_shuffle, "pixel_shuffle"),
    **_table(views.pixel_unshuffle, "pixel_unshuffle"),
}
