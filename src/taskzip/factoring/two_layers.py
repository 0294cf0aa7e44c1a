"""A layer of low rank as two layers of torch's own, one behind the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taskzip.algebra import LowRank
from taskzip.graph import Layer

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def can_be_two(network: nn.Module, layer: Layer) -> bool:
    """Whether a layer is a module of torch's own, with nothing done to its weights, that two can stand for."""
    path, _, name = layer.weight.rpartition(".")
    if name != "weight" or not path:
        return False
    module = network.get_submodule(path)
    return type(module) in _KINDS and not network.get_parameter(layer.weight).is_complex()


def put_two(network: nn.Module, layer: Layer, factors: LowRank) -> None:
    """Put two layers into the place of one: from its inputs to the rank, and from there to its units."""
    path = layer.weight.rpartition(".")[0]
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, _two(network.get_submodule(path), factors))


def _two(module: Any, factors: LowRank) -> nn.Sequential:
    rank, bias = len(factors.right), module.bias is not None
    if isinstance(module, nn.Linear):
        first, second = nn.Linear(module.in_features, rank, bias=False), nn.Linear(rank, module.out_features, bias)
    else:
        kind: Any = type(module)
        slides = (module.kernel_size, module.stride, module.padding, module.dilation)
        first = kind(module.in_channels, rank, *slides, bias=False, padding_mode=module.padding_mode)
        second = kind(rank, module.out_channels, 1, bias=bias)
    pair = nn.Sequential(first, second).to(module.weight)
    _fill(first, factors.right)
    _fill(second, factors.left, factors.bias if bias else None)
    pair.train(module.training)
    for parameter in pair.parameters():
        parameter.requires_grad_(module.weight.requires_grad)
    return pair


@torch.no_grad()
def _fill(module: Any, weight: Tensor, bias: Tensor | None = None) -> None:
    module.weight.copy_(weight.reshape(module.weight.shape))
    if bias is not None:
        module.bias.copy_(bias)
