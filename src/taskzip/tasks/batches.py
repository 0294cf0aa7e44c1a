"""Batches of a loader as it gave them on its first pass, so that everything is loaded once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from taskzip.tasks.task import Batch, plain

MEMORY = 2**29
"""Bytes of batches that are kept for one task."""


class Kept:
    """The batches of an iterable, which is read again only where they take more memory than this."""

    def __init__(self, data: Iterable[Batch], memory: int = MEMORY) -> None:
        self._data = data
        self._memory = memory
        self._batches: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        """One pass."""
        if self._batches is not None:
            yield from self._batches
            return
        kept: list[Batch] = []
        left = self._memory
        for batch in self._data:
            if left > 0:
                left -= sum(t.nbytes for t in pytree.tree_leaves(plain(batch)) if isinstance(t, Tensor))
                kept.append(pytree.tree_map_only(Tensor, torch.clone, plain(batch)))  # a loader may refill its tensors
            if left <= 0:
                kept.clear()
            yield batch
        if left > 0:
            self._batches = kept
