"""What a layer reads and answers as rows: one for each place, of a convolution the patches that its kernel sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taskzip.graph import Layer
from taskzip.observing.layer_calls import Read


def inputs_of(read: Read, layer: Layer) -> Tensor:
    """What a layer reads: [*places, inputs] or [*places, inputs, *kernel], without a copy."""
    x = _at_least_float32(read.x)
    return x.reshape(-1, x.shape[-1]) if read.slide is None else _windows(x, layer.kernel, **read.slide)


def outputs_of(read: Read, layer: Layer) -> Tensor:
    """What a layer answers: [*places, units]."""
    assert read.z is not None
    return by_channel(read.z, layer)


def by_channel(z: Tensor, layer: Layer) -> Tensor:
    """What a layer reads or answers, its channels last: [*places, channels]."""
    z = _at_least_float32(z)
    if not layer.kernel:
        return z.reshape(-1, z.shape[-1])
    channel = z.dim() - 1 - len(layer.kernel)
    return z.movedim(channel, -1) if channel else z.movedim(0, -1)[None]


def _windows(x: Tensor, kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> Tensor:
    """A view of what a kernel sees at each place: [batch, *places, channels, *kernel] (a copy only for padding)."""
    n = len(kernel)
    stride, dilation = _each(stride, n), _each(dilation, n)
    if x.dim() == n + 1:  # a sample without a batch axis
        x = x[None]
    if padding == "valid":
        padding = 0
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    sides = [(r // 2, r - r // 2) for r in reach] if padding == "same" else [(p, p) for p in _each(padding, n)]
    if any(side != (0, 0) for side in sides):
        x = F.pad(x, [amount for side in reversed(sides) for amount in side])
    places = [(size - r - 1) // s + 1 for size, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    steps = x.stride()
    return x.as_strided(
        (x.shape[0], *places, x.shape[1], *kernel),
        (
            steps[0],
            *(t * s for t, s in zip(steps[2:], stride, strict=True)),
            steps[1],
            *(t * d for t, d in zip(steps[2:], dilation, strict=True)),
        ),
        x.storage_offset(),
    )


def _each(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value) * (n if len(value) == 1 else 1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
