"""Layers of torch whose groups of units are computed one by one, each from the inputs that it reads (design 2.1).

Where shared units read shared inputs only, nothing is computed for weights that do not exist, and what the shared units
give is the same call for all tasks, so that it can be computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Grouped(Protocol):
    """A weight or bias of which groups of rows are computed one by one."""

    def _grouped(self) -> list[Tensor]: ...

    def _reads(self) -> list[tuple[int, int] | Tensor | None]: ...

    def _ordered(self, rows: Tensor, dim: int) -> Tensor: ...


def apart_forward(
    original: type[nn.Module], otherwise: Callable[[Any, Tensor], Tensor]
) -> Callable[[Any, Tensor], Tensor]:
    """A forward for modules of this class, one of torch's own layers, with blocks for weights.

    Args:
        original: the class.
        otherwise: the forward of those whose groups are not computed one by one.
    """

    def forward(module: Any, input: Tensor) -> Tensor:
        weight, bias = module._modules["weight_blocks"], module._modules.get("bias_blocks")
        if not weight._spec.apart or (bias is None and module.bias is not None):
            return otherwise(module, input)
        if issubclass(original, nn.Linear):
            return _computed(weight, bias, F.linear, input, -1)
        return _computed(weight, bias, module._conv_forward, input, -1 - len(module.kernel_size))

    return forward


def _computed(weight: _Grouped, bias: _Grouped | None, run: Callable[..., Tensor], x: Tensor, dim: int) -> Tensor:
    reads = weight._reads()
    biases = [None] * len(reads) if bias is None else bias._grouped()
    found = [
        run(_selected(x, dim, reads), rows, each)
        for rows, each, reads in zip(weight._grouped(), biases, reads, strict=True)
    ]
    return weight._ordered(found[0] if len(found) == 1 else torch.cat(found, dim), dim)


def _selected(x: Tensor, dim: int, reads: tuple[int, int] | Tensor | None) -> Tensor:
    """The inputs that a group reads: a start and a length, numbers, or all."""
    if reads is None:
        return x
    return x.narrow(dim, *reads) if isinstance(reads, tuple) else x.index_select(dim, reads)
