"""Batches from tensors that are in memory: the smallest thing that `Task` takes as data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Batches:
    """Batches of `(inputs, targets)`, or of inputs alone, re-iterable any number of times.

    Args:
        inputs: all samples, [n, ...].
        targets: their targets, [n, ...], or None.
        size: samples a batch; the last batch may be smaller.
        shuffle: draw a new order on every pass, from torch's global generator.

    Raises:
        ValueError: no samples, a batch size below 1, or targets of another length.
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor | None = None, *, size: int = 256, shuffle: bool = False
    ) -> None:
        if not len(inputs) or size < 1:
            raise ValueError(f"batches of {size} from {len(inputs)} samples: both must be at least 1")
        if targets is not None and len(targets) != len(inputs):
            raise ValueError(f"{len(inputs)} inputs, but {len(targets)} targets")
        self.inputs, self.targets, self.size, self.shuffle = inputs, targets, size, shuffle

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.size)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.inputs)) if self.shuffle else torch.arange(len(self.inputs))
        for chosen in order.split(self.size):
            index = chosen.to(self.inputs.device)
            yield self.inputs[index] if self.targets is None else (self.inputs[index], self.targets[index])


def batches(inputs: Tensor, targets: Tensor | None = None, *, size: int = 256, shuffle: bool = False) -> Batches:
    """Cut tensors into batches; see `Batches`."""
    return Batches(inputs, targets, size=size, shuffle=shuffle)
