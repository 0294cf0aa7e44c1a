"""Retraining is watched: some batches of each task are held out, and the state that is best on them is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from taskzip.tasks import Batch, Task, input_tensors

PART = 8
"""One batch in so many is held out."""

MOST = 8
"""Batches of a task that are held out at most."""

STEPS_PER_BATCH = 10
"""Steps of retraining for each batch that is held out: to look at them must stay cheap."""

LOOKS = 5
"""How often one looks while retraining."""

_LEAST_STEPS = 4


class Held:
    """Some of a task's batches, evenly spread over all, and the others, over and over again.

    The batches of a loader that gives the same ones on every pass are not trained on; of a loader that shuffles, single
    samples of them are. A task of one batch is watched on that batch.
    """

    def __init__(self, task: Task, steps: int) -> None:
        self._task = task
        most = max(1, min(MOST, steps // STEPS_PER_BATCH))
        self._held = _spread(task.batches(), most)
        self.batches = list(self._held.values())

    def others(self) -> Iterator[Batch]:
        """Without end: all batches that are not held out."""
        while True:
            left = 0
            for index, batch in enumerate(self._task.batches()):
                if index not in self._held or not _same(batch, self._held[index]):
                    left += 1
                    yield batch
            if not left:
                self._held = {}


class Watch:
    """The loss of a joint network on what is held out, and the best state so far.

    Attributes:
        start: the loss before the first step.
        best: the lowest loss.
        step: after how many steps it was reached.
    """

    def __init__(self, loss: Callable[[], float], state: Sequence[Tensor]) -> None:
        """How to measure the loss, and the tensors that retraining changes."""
        self._loss, self._state = loss, state
        self.start = self.best = loss()
        self.step = 0
        self._keep()

    def look(self, step: int) -> float:
        """Measure after so many steps, and keep the state if it is the best; the loss."""
        now = self._loss()
        if now < self.best:
            self.best, self.step = now, step
            self._keep()
        return now

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the best state."""
        for tensor, best in zip(self._state, self._kept, strict=True):
            tensor.copy_(best)

    def _keep(self) -> None:
        self._kept = [tensor.detach().clone() for tensor in self._state]


def looks(steps: int) -> set[int]:
    """After which steps to look: evenly spread, and at the end."""
    return {*range(0, steps, max(_LEAST_STEPS, math.ceil(steps / LOOKS))), steps} - {0}


def _spread(batches: Iterator[Batch], most: int) -> dict[int, Batch]:
    """By number, one batch in `PART` or fewer, evenly spread, as is only known when all were read."""
    kept: list[tuple[int, Batch]] = []
    part, seen = 1, 0
    for seen, batch in enumerate(batches, 1):
        if (seen - 1) % part == 0:
            kept.append((seen - 1, batch))
        if len(kept) > 4 * most:
            part, kept = 2 * part, kept[::2]
    wanted = max(1, min(most, seen // PART))
    return dict(kept[(2 * i + 1) * len(kept) // (2 * wanted)] for i in range(wanted))


def _same(a: Batch, b: Batch) -> bool:
    pairs = zip(input_tensors(a), input_tensors(b), strict=False)
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)
