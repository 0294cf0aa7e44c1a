"""Bytes of networks: of the parameters and buffers that a checkpoint holds."""

from __future__ import annotations

import math

from torch import Tensor, nn

from taskzip.zipped.blocks import installed, spec_of


def bytes_together(network: nn.Module) -> int:
    """Bytes of a network's tensors as they are; what several tasks or modules share counts once."""
    return sum(_bytes(tensor) for tensor in _tensors(network))


def bytes_apart(network: nn.Module) -> int:
    """Bytes of one task's network by itself, with dense weights instead of blocks."""
    blocks = installed(network).values()
    inside = {id(p) for b in blocks for p in b.parameters()}
    dense = sum(math.prod(spec_of(b).dense_shape) * next(b.parameters()).element_size() for b in blocks)
    return dense + sum(_bytes(tensor) for tensor in _tensors(network) if id(tensor) not in inside)


def _tensors(network: nn.Module) -> list[Tensor]:
    state = network.state_dict(keep_vars=True).values()
    return list({id(tensor): tensor for tensor in state if isinstance(tensor, Tensor)}.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
