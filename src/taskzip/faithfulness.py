"""How far a joint network's answers are from those of the networks that it was made from, on calibration data."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taskzip.errors import TaskzipWarning
from taskzip.observation import evaluating, run_batch
from taskzip.task import Task, samples_in
from taskzip.zipped import ZippedModel
from taskzip.zipped.summary import how_far

log = logging.getLogger("taskzip")

SAMPLES = 512
"""Batches are compared until these hold so many samples."""

FAR = 0.5
"""Answers are far off with more than this part of the squared error of a constant answer."""

_CONSTANT = 1e-8
"""Outputs that vary less than this, relative to their squares, do not vary."""


def record_answers(zipped: ZippedModel, tasks: Sequence[Task]) -> None:
    """Compare every task's answers with its own network's, write that into the history, and warn where they are far.

    The history's "answers" hold by task: "error", the mean squared distance to the original outputs relative to their
    variance, of the output tensor where it is largest (1 is what a constant answer reaches, None where the outputs do
    not vary); "alike", the part of the samples with the same class, for cross-entropy; and how many "samples" it was.
    """
    found = {task.name: compare(task, zipped[task.name]) for task in tasks}
    zipped.history.settings["answers"] = found
    for task, each in zip(tasks, found.values(), strict=True):
        log.info("task %r: error of the answers %s, a constant answer's being 1", task.name, how_far(each))
        if each["error"] is None and each["samples"] > 1:
            _warn(
                f"task {task.name!r}: the network gives the same answer to all {each['samples']} calibration samples "
                f"that were compared: are its inputs scaled as they were in training?"
            )
        elif each["error"] is not None and each["error"] > FAR:
            worse = ", more than that of a constant answer, 1" if each["error"] > 1 else ", a constant answer's being 1"
            _warn(
                f"task {task.name!r}: the joint network's answers are far from the original's: the error on the "
                f"calibration data is {how_far(each)}{worse}. Share less, or retrain with taskzip.retrain."
            )


def compare(task: Task, network: nn.Module) -> dict[str, Any]:
    """What `record_answers` writes down of one task."""
    outputs: list[_Output] = []
    alike = samples = 0
    with evaluating(task.model, network):
        for index, batch in enumerate(task.batches()):
            wanted, given = (run_batch(task, model, batch, index) for model in (task.model, network))
            pairs = zip(pytree.tree_leaves(wanted), pytree.tree_leaves(given), strict=True)
            numbers = [(y, z) for y, z in pairs if isinstance(y, Tensor) and y.is_floating_point()]
            outputs = outputs or [_Output() for _ in numbers]
            for output, (y, z) in zip(outputs, numbers, strict=True):
                output.update(y, z)
            alike += _alike(task, wanted, given)
            samples += samples_in(batch)
            if samples >= SAMPLES:
                break
    errors = [error for output in outputs if (error := output.error()) is not None]
    classes = alike / samples if _is_classes(task, wanted) else None
    return {"error": max(errors, default=None), "alike": classes, "samples": samples}


class _Output:
    """Sums over one tensor of a network's output, less its first values, so that little is lost.

    The constant answer has a value for every place of a sample; where samples differ in size, one value for all.
    """

    def __init__(self) -> None:
        self._origin: Tensor | None = None
        self._sums: list[Tensor] = []
        self._values = 0
        self._square = self._size = self._distance = 0.0

    def update(self, wanted: Tensor, given: Tensor) -> None:
        """The outputs of one batch, those of the original network and those of the joint one."""
        y, z = (x.double().reshape(len(x) if x.dim() else 1, -1) for x in (wanted, given))
        both = y.isfinite() & z.isfinite()
        y, z = y.where(both, 0), z.where(both, 0)
        self._origin = y[:1, :1] if self._origin is None else self._origin
        apart = y - self._origin
        self._sums.append(apart.sum(0))
        self._values += y.numel()
        self._square += float(apart.square().sum())
        self._size += float(y.square().sum())
        self._distance += float((y - z).square().sum())

    def error(self) -> float | None:
        """The squared distance, relative to that of the best constant answer; None where that is one too."""
        if not self._values:
            return None
        places = len(self._sums[0]) if len({len(each) for each in self._sums}) == 1 else 1
        total = torch.stack([each.reshape(-1, places).sum(0) for each in self._sums]).sum(0)
        constant = self._square - float(total.square().sum()) * places / self._values
        return self._distance / constant if constant > _CONSTANT * self._size else None


def _alike(task: Task, wanted: Any, given: Any) -> int:
    return int((wanted.argmax(1) == given.argmax(1)).sum()) if _is_classes(task, wanted) else 0


def _is_classes(task: Task, output: Any) -> bool:
    """Whether an output is class scores, a row a sample."""
    classes = task.loss is F.cross_entropy or isinstance(task.loss, nn.CrossEntropyLoss)
    return classes and isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1


def _warn(message: str) -> None:
    warnings.warn(message, TaskzipWarning, stacklevel=3)
