"""What the original network answered: remembered from one pass over the data, so that it need not run for every layer.

Only sampled rows are kept. Where they would take too much memory, or a loader gives other batches on every pass, there
is nothing to recall, and the network has to run again.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from taskzip.algebra import LayerStatistics
from taskzip.tasks import Batch, input_tensors

MEMORY = 2**30
"""Bytes of answers that are kept for one task."""


class Answers:
    """Answers of one network by layer and batch, chunk by chunk as they were sampled.

    Attributes:
        moments: of layers whose answers are not needed row by row, the sums that mean and variance come from.
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self._left = memory
        self._batches: list[int] = []
        self._kept: dict[tuple[str, int], list[Tensor]] = {}
        self._too_large: set[str] = set()
        self.moments: dict[str, LayerStatistics] = {}

    @property
    def started(self) -> bool:
        """Whether the pass was made."""
        return bool(self._batches)

    def start(self, batch: Batch) -> None:
        """What is kept from here on belongs to this batch."""
        self._batches.append(_fingerprint(batch))

    def keep(self, layer: str, answers: Tensor) -> None:
        """One more chunk of a layer's answers, [rows, units]."""
        if layer in self._too_large:
            return
        self._left -= answers.nbytes
        if self._left < 0:
            self.forget(layer)
            self._too_large.add(layer)
            self._left += answers.nbytes
        else:
            self._kept.setdefault((layer, len(self._batches) - 1), []).append(answers)

    def know(self, layer: str) -> bool:
        """Whether answers of a layer were kept."""
        return (layer, 0) in self._kept

    def recall(self, layer: str, batch: Batch, index: int) -> list[Tensor] | None:
        """The chunks of a layer's answers to the batch of this number, if they were kept and it is the same batch."""
        if layer in self._too_large or index >= len(self._batches) or self._batches[index] != _fingerprint(batch):
            return None
        return self._kept.get((layer, index))

    def forget(self, layer: str) -> None:
        """A layer's answers are not needed any more."""
        for key in [key for key in self._kept if key[0] == layer]:
            self._left += sum(answers.nbytes for answers in self._kept.pop(key))


def _fingerprint(batch: Batch) -> int:
    found = 0
    for tensor in input_tensors(batch):
        whole = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        found = zlib.crc32(whole.numpy().data, found)
    return found
