"""Layers of torch whose groups of units are computed one by one, each from the inputs that it reads (design 2.1).

Where shared units read shared inputs only, nothing is computed for weights that do not exist, and what the shared units
give is the same call for all tasks, so that it can be computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from taskzip.zipped.blocks import Blocks

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def apart_forward(original: type[nn.Module]) -> Callable[[Any, Tensor], Any] | None:
    """A forward for modules of this class with blocks for weights; None where the class has a forward of its own."""
    if original.forward is nn.Linear.forward:
        return _forward(original, lambda module, x, weight, bias: F.linear(x, weight, bias), lambda _: -1)
    for kind in _CONVOLUTIONS:
        if original.forward is kind.forward and getattr(original, "_conv_forward", None) is kind._conv_forward:
            return _forward(original, kind._conv_forward, lambda module: -1 - len(module.kernel_size))
    return None


def _forward(
    original: type[nn.Module], run: Callable[..., Tensor], channels: Callable[[Any], int]
) -> Callable[[Any, Tensor], Any]:
    def forward(module: Any, input: Tensor) -> Any:
        weight, bias = module._modules.get("weight_blocks"), module._modules.get("bias_blocks")
        if weight is None or not weight._spec.apart or (bias is None and module.bias is not None):
            return original.forward(module, input)
        return _computed(weight, bias, lambda x, w, b: run(module, x, w, b), input, channels(module))

    return forward


def _computed(weight: Blocks, bias: Blocks | None, run: Callable[..., Tensor], x: Tensor, dim: int) -> Tensor:
    biases = [None] * len(weight._spec.rows) if bias is None else bias._groups()
    found = [
        run(_selected(x, dim, reads), rows, each)
        for rows, each, reads in zip(weight._groups(), biases, weight._reads(), strict=True)
    ]
    return weight._ordered(found[0] if len(found) == 1 else torch.cat(found, dim), dim)


def _selected(x: Tensor, dim: int, reads: tuple[int, int] | Tensor | None) -> Tensor:
    """The inputs that a group reads: a start and a length, numbers, or all."""
    if reads is None:
        return x
    return x.narrow(dim, *reads) if isinstance(reads, tuple) else x.index_select(dim, reads)
