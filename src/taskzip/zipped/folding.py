"""Batch-norm folded into the layer before it, so that nothing of the two is private when the layer is shared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from taskzip.graph import Layer

Folded = list[tuple[str, str]]
"""Paths of the layers and of the batch-norms that were folded into them."""


def foldable(network: nn.Module, layers: Iterable[Layer]) -> Folded:
    """Which batch-norms can be folded: torch's own, directly behind a linear layer or a convolution of torch."""
    found = []
    for layer in layers:
        if layer.batch_norm is None or not layer.weight.endswith("weight"):
            continue
        path, norm = (name.rpartition(".")[0] for name in (layer.weight, layer.batch_norm.mean))
        # A subclass may do more in its forward.
        if can_fold(network, path, norm) and type(network.get_submodule(norm)).forward is _BatchNorm.forward:
            found.append((path, norm))
    return found


def can_fold(network: nn.Module, path: str, norm: str) -> bool:
    """Whether there is a layer of torch and a module for its batch-norm at these paths."""
    modules = dict(network.named_modules())
    return norm in modules and isinstance(modules.get(path), (nn.Linear, _ConvNd))


def fold(network: nn.Module, folded: Folded) -> None:
    """Give every layer the weights that it has with its batch-norm, in place; the batch-norm becomes an identity."""
    for path, norm in folded:
        layer, bn = _layer(network, path), network.get_submodule(norm)
        assert isinstance(bn, _BatchNorm)
        with torch.no_grad():
            assert bn.running_mean is not None
            assert bn.running_var is not None
            scale = (bn.running_var.double() + bn.eps).rsqrt()
            scale = scale if bn.weight is None else scale * bn.weight.double()
            bias = bn.running_mean.new_zeros(()) if layer.bias is None else layer.bias
            shift = (bias - bn.running_mean.double()) * scale
            shift = shift if bn.bias is None else shift + bn.bias.double()
            weight = layer.weight
            weight.copy_(weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1)))
            shift = shift.to(weight.dtype)
        forget_batch_norms(network, [(path, norm)])
        layer.bias = nn.Parameter(shift, requires_grad=weight.requires_grad)


def _layer(network: nn.Module, path: str) -> nn.Linear | _ConvNd:
    layer = network.get_submodule(path)
    assert isinstance(layer, (nn.Linear, _ConvNd))
    return layer


def forget_batch_norms(network: nn.Module, folded: Sequence[tuple[str, str]]) -> None:
    """Only the shape of what `fold` does: biases, with any values, and identities."""
    for path, norm in folded:
        layer = _layer(network, path)
        if layer.bias is None:
            weight = layer.weight
            layer.bias = nn.Parameter(weight.new_zeros(len(weight)), requires_grad=weight.requires_grad)
        network.set_submodule(norm, nn.Identity())
