"""Products with a weight that lies in blocks, one block after another: the whole weight is never put together.

Putting a weight together copies it twice. Where the weight is large and only few positions are computed with it, that
takes longer than the product itself. One block at a time reads every weight once and copies none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Row = tuple[list[Tensor], Tensor | None]
"""Of a group of rows, its blocks side by side, and the order into which their columns are put."""

_CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LARGE_LINEAR, LARGE = 2**16, 2**20
"""Numbers in a weight: below these sizes several small products take longer than a copy and one product."""

_FEW, _MANY = 128, 1024
"""Positions: with more than these the copy no longer matters."""


def forward_in_blocks(original: type[nn.Module]) -> Callable[[Any, Tensor], Tensor] | None:
    """A forward for modules of a class whose own forward is torch's; None where it is the user's."""
    forward: Any = original.forward
    if forward is nn.Linear.forward:
        return _linear
    for kind in _CONVOLUTIONS:
        if forward is kind.forward and getattr(original, "_conv_forward", None) is kind._conv_forward:
            return _convolution
    return None


def _linear(module: Any, input: Tensor) -> Tensor:
    blocks = module._modules["weight_blocks"]
    size = math.prod(blocks._shape)
    if size >= LARGE_LINEAR and blocks._whole is None:
        most = (_MANY if size >= LARGE else _FEW) * blocks._shape[1]
        if _may_split(module, blocks, input) and input.numel() <= most:
            return blocks._scaled(_product(F.linear, module, blocks, input, dim=-1), module.bias, -1)
    if _scales_behind(blocks, input):
        return blocks._scaled(F.linear(input, blocks._together()), module.bias, -1)
    return F.linear(input, module.weight, module.bias)


def _convolution(module: Any, input: Tensor) -> Tensor:
    blocks = module._modules["weight_blocks"]
    size, axis = math.prod(blocks._shape), -len(module.kernel_size) - 1  # a single sample may come without a batch
    if size >= LARGE and blocks._whole is None:
        most = _MANY * blocks._shape[1] * math.prod(module.stride)
        if _may_split(module, blocks, input) and input.numel() <= most:
            found = _product(module._conv_forward, module, blocks, input, input.dim() + axis)
            return blocks._scaled(found, module.bias, axis)
    if _scales_behind(blocks, input):
        return blocks._scaled(module._conv_forward(input, blocks._together(), None), module.bias, axis)
    return module._conv_forward(input, module.weight, module.bias)


def _scales_behind(blocks: Any, input: Tensor) -> bool:
    """Whether what units give is scaled, not their weights: where these are more, and in graphs, which share them."""
    if not blocks._scales:
        return False
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or blocks._quantised():
        return True
    return bool(input.numel() // blocks._shape[1] < math.prod(blocks._shape[1:]))


def _may_split(module: Any, blocks: Any, input: Tensor) -> bool:
    """Only where nothing is recorded (there sizes may be unknown), and where the sum of products is as precise as one.

    A bias has to be grouped as the weight is, or is added to what is put together and scaled.
    """
    bias = module._modules.get("bias_blocks")
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch.is_autocast_enabled(input.device.type)
        or input.dtype not in (torch.float32, torch.float64)
        or (module.bias is not None and not blocks._scales if bias is None else bias._groups != blocks._groups)
    )


def _product(product: Callable[..., Tensor], module: Any, blocks: Any, input: Tensor, dim: int) -> Tensor:
    """The sum over the blocks of each group of rows, and the groups one below the other."""
    bias = module._modules.get("bias_blocks")
    biases = [None] * len(blocks._groups) if bias is None else [part for (part,), _ in bias._rows()]
    outputs = []
    for (parts, order), each in zip(blocks._rows(), biases, strict=True):
        given = input if order is None else torch.empty_like(input).index_copy_(dim, order, input)
        if len(parts) == 1:
            outputs.append(product(given, parts[0], each))
            continue
        pieces = given.split([part.shape[1] for part in parts], dim)
        output = product(pieces[0], parts[0], each)
        for piece, part in zip(pieces[1:], parts[1:], strict=True):
            output.add_(product(piece, part, None))
        outputs.append(output)
    whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim)
    order = blocks._order()
    return whole if order is None else whole.index_select(dim, order)
