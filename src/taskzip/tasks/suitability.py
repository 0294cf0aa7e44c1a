"""Whether calibration data look like what a network was trained on: from its own answers, and labels if there are any.

Loaders that were swapped or inputs that were scaled otherwise do not show in how well a zip agrees with the original,
because it agrees on those data. Without labels, only inputs that are far too large show.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from taskzip.tasks.labels import is_cross_entropy
from taskzip.tasks.task import Batch, Task

_FEWEST = 16
"""With fewer labels there is no telling."""

_APART = 100.0
"""Class scores that lie farther apart, in nats, are those of inputs on another scale."""


class Suitability:
    """What a network answers on its own calibration data, where these answers are class scores."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._right = 0
        self._labels: list[Tensor] = []
        self._margins: list[Tensor] = []
        self._classes = 0

    def update(self, batch: Batch, output: Any) -> None:
        """One more batch, and what the original network answers to it."""
        if not is_classes(self._task, output):
            return
        self._classes = output.shape[1]
        best = output.double().topk(2, 1).values
        self._margins.append(best[:, 0] - best[:, 1])
        labels = self._task.targets(batch)
        if isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == output.shape[:1]:
            self._labels.append(labels)
            self._right += int((output.argmax(1) == labels.to(output.device)).sum())

    def complaints(self) -> Iterator[str]:
        """What speaks against the data."""
        labels = torch.cat(self._labels) if self._labels else torch.empty(0, dtype=torch.int64)
        if len(labels) >= _FEWEST:
            most = float(labels.unique(return_counts=True)[1].max()) / len(labels)
            right = self._right / len(labels)
            if right <= max(most, 1 / self._classes) and most < 0.5:
                yield (
                    f"the network itself is right on {right:.0%} of its calibration data, and always answering the "
                    f"most frequent class would be on {most:.0%}: are these its own data, scaled as in training?"
                )
        if self._margins and (apart := float(torch.cat(self._margins).median())) > _APART:
            yield (
                f"on its calibration data the network's class scores lie {apart:.0f} apart: are its inputs scaled as "
                f"in training?"
            )


def is_classes(task: Task, output: Any) -> bool:
    """Whether an output is class scores, a row a sample."""
    classes = is_cross_entropy(task)
    if not isinstance(output, Tensor) or output.is_complex():
        return False
    return classes and output.dim() == 2 and output.shape[1] > 1
