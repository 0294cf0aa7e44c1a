"""Products with a weight that lies in blocks, one block after another: the whole weight is never put together.

Putting a weight together copies it twice. Where the weight is large and only few positions are computed with it, that
takes longer than the product itself. One block at a time reads every weight once and copies none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = Sequence[tuple[Sequence[Tensor], Tensor | None]]
"""Per group of rows, its blocks side by side, and the order into which their columns are put."""

_CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Measured in benchmarks/products.py: below these sizes several small products take longer than a copy and one product,
# and with more positions than these the copy no longer matters.
_LARGE_LINEAR, _LARGE = 2**16, 2**20
_FEW, _MANY = 128, 1024


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
    if blocks._size >= _LARGE_LINEAR and blocks._whole is None and _may_split(input, blocks):
        positions = input.numel() // max(input.shape[-1], 1)
        if positions <= (_MANY if blocks._size >= _LARGE else _FEW):
            biases = _biases(module, blocks)
            if biases is not None:
                return _product(F.linear, input, blocks, biases, dim=-1)
    return F.linear(input, module.weight, module.bias)


def _convolution(module: Any, input: Tensor) -> Tensor:
    blocks = module._modules["weight_blocks"]
    if blocks._size >= _LARGE and blocks._whole is None and _may_split(input, blocks):
        dim = input.dim() - len(module.kernel_size) - 1  # a single sample may come without a batch
        positions = input.numel()
        for each in (input.shape[dim], *module.stride):
            positions //= max(each, 1)
        if positions <= _MANY:
            biases = _biases(module, blocks)
            if biases is not None:
                return _product(module._conv_forward, input, blocks, biases, dim=dim)
    return module._conv_forward(input, module.weight, module.bias)


def _may_split(input: Tensor, blocks: Any) -> bool:
    """Only where nothing is recorded, and where the sum of two products is as precise as one."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch.is_autocast_enabled(input.device.type)
        or input.dtype not in (torch.float32, torch.float64)
    )


def _biases(module: Any, blocks: Any) -> list[Tensor | None] | None:
    """A bias for each group of rows, or None for each; None where the bias is not grouped as the weight is."""
    groups = [blocks[0].shape[0] for blocks, _ in blocks._rows()]
    whole = module._modules.get("bias_blocks")
    if whole is None:
        return [None] * len(groups) if module.bias is None else None
    parts = [whole._row(*row) for row in whole._rows()]
    return list(parts) if [len(part) for part in parts] == groups else None


def _product(
    product: Callable[..., Tensor], input: Tensor, blocks: Any, biases: Sequence[Tensor | None], dim: int
) -> Tensor:
    """The sum over the blocks of each group of rows, and the groups one below the other."""
    outputs = []
    for (parts, order), bias in zip(blocks._rows(), biases, strict=True):
        given = input if order is None else torch.empty_like(input).index_copy_(dim, order, input)
        pieces = given.split([part.shape[1] for part in parts], dim)
        output = product(pieces[0], parts[0], bias)
        for piece, part in zip(pieces[1:], parts[1:], strict=True):
            output.add_(product(piece, part, None))
        outputs.append(output)
    whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim)
    order = blocks._order()
    return whole if order is None else whole.index_select(dim, order)
