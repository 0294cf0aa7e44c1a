"""Batch-norm kept apart from weights that others use too.

XNNPACK folds batch-norm into the weights of the layer before it. Where these are shared and the batch-norms are not,
every task would get a copy.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from taskzip.export.blockwise import LAYERS
from taskzip.export.graphs import JointGraph, arguments, aten


def keep_apart(graph: JointGraph) -> None:
    """Turn every batch-norm behind weights with several users into a scale and a shift of each channel, in place."""
    for node in graph.operators():
        if node.target == aten._native_batch_norm_legit_no_training.default:
            layer, *parameters = arguments(node)[:5]
            values = [graph.value(each) for each in parameters]
            known = all(value is not None for each, value in zip(parameters, values, strict=True) if each is not None)
            if known and not _has_one_user(layer):
                _scale_and_shift(graph, node, *values)
    graph.unite()


def _has_one_user(layer: Node) -> bool:
    """Whether it is a layer that nobody but the batch-norm reads, with a weight that no other layer has."""
    return layer.target in LAYERS and len(layer.users) == len(arguments(layer)[1].users) == 1


def _scale_and_shift(graph: JointGraph, node: Node, weight: Any, bias: Any, mean: Any, variance: Any) -> None:
    x, epsilon = arguments(node)[0], arguments(node)[6]
    example = x.meta["val"]
    scale = (variance.double() + epsilon).rsqrt() * (1 if weight is None else weight.double())
    shift = (0 if bias is None else bias.double()) - mean.double() * scale
    scale, shift = scale.to(example.dtype), shift.to(example.dtype)
    if example.dim() == 4:
        # For XNNPACK a convolution of each channel by itself is one pass over the data, `mul` and `add` are two.
        kernels = graph.constant("scale", scale.reshape(-1, 1, 1, 1))
        settings = ([1, 1], [0, 0], [1, 1], len(scale))
        new = graph.call(node, aten.conv2d.default, x, kernels, graph.constant("shift", shift), *settings)
    else:
        shape = (-1, *[1] * (example.dim() - 2))
        new = graph.call(node, aten.mul.Tensor, x, graph.constant("scale", scale.reshape(shape)))
        new = graph.call(node, aten.add.Tensor, new, graph.constant("shift", shift.reshape(shape)))
    for user in list(node.users):  # batch-norm gives what it saves for gradients, too
        assert user.target is operator.getitem
        if user.args[1] == 0:
            graph.replace(user, new)
