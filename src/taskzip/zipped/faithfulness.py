"""How far a joint network's answers are from those of the networks that it was made from, on calibration data."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taskzip.errors import InputError, TaskzipWarning
from taskzip.tasks import Batch, Suitability, Task, evaluating, input_tensors, is_classes, run_batch, samples_in
from taskzip.zipped.network import JointNetwork
from taskzip.zipped.summary import how_far

log = logging.getLogger("taskzip")

SAMPLES = 128
"""About so many samples are compared, in batches from all over the data."""

FAR = 0.5
"""Answers are far off with more than this part of the squared error of a constant answer."""

UNKNOWN = 0.01
"""Samples are too few if half-way between them the error is above this, and"""

_FARTHER = 5.0
"""so many times that on the samples."""

_AT_ONCE = 16
"""At least so many samples are taken of a batch."""

_BETWEEN = 32
"""So many samples are looked at half-way."""

_CONSTANT = 1e-8
"""Outputs that vary less than this, relative to their squares, do not vary."""


def record_answers(zipped: JointNetwork, tasks: Sequence[Task]) -> None:
    """Compare every task's answers with its own network's, write that into the history, and warn where they are far.

    The history's "answers" hold by task: "error", the mean squared distance to the original outputs relative to their
    variance, of the output tensor where it is largest (1 is what a constant answer reaches, None where the outputs do
    not vary); "between", the same half-way between samples (None where inputs are no numbers); "alike", the part of the
    samples with the same class, for cross-entropy; and how many "samples" it was.
    """
    samples = zipped.history.settings["samples"]
    suits = {task.name: Suitability(task) for task in tasks}
    found = {task.name: _compare(task, zipped[task.name], samples[task.name], suits[task.name]) for task in tasks}
    zipped.history.settings["answers"] = found
    for task in tasks:
        each = found[task.name]
        log.info("task %r: error of the answers %s, a constant answer's being 1", task.name, how_far(each))
        for said in (*_complaints(each, samples[task.name]), *suits[task.name].complaints()):
            warnings.warn(f"task {task.name!r}: {said}", TaskzipWarning, stacklevel=3)


def _complaints(answers: Mapping[str, Any], samples: int) -> Iterator[str]:
    error, between = answers["error"], answers["between"]
    if error is None:
        if answers["samples"] > 1:
            yield (
                f"the network gives the same answer to all {answers['samples']} calibration samples that were looked "
                f"at: are its inputs scaled as they were in training?"
            )
    elif error > FAR:
        worse = ", more than that of a constant answer, 1" if error > 1 else ", a constant answer's being 1"
        yield (
            f"the joint network's answers are far from the original's: the error on the calibration data is "
            f"{how_far(answers)}{worse}. Share less, or retrain with taskzip.retrain."
        )
    elif between is not None and between > max(UNKNOWN, _FARTHER * error):
        yield (
            f"{samples} calibration samples are too few: on them the error of the answers is {error:.2g}, half-way "
            f"between them {between:.2g}, a constant answer's being 1. Pass more of them, or share less."
        )


def _compare(task: Task, network: nn.Module, samples: int, suits: Suitability) -> dict[str, Any]:
    """What `record_answers` writes down of one task."""
    outputs, between = _Outputs(), _Outputs()
    alike = passed = 0
    wanted: Any = None
    with evaluating(task.model, network):
        for index, batch in enumerate(task.batches()):
            size = samples_in(batch)
            passed += size
            if outputs.samples and outputs.samples * samples >= SAMPLES * passed:  # ahead of an even pace
                continue
            count = max(_AT_ONCE, SAMPLES * size // samples)
            batch, (wanted, given) = _both(task, network, index, (_some(batch, count), batch))
            outputs.update(wanted, given, samples_in(batch))
            alike += _alike(task, wanted, given)
            suits.update(batch, wanted)
            if between.samples < _BETWEEN and (halves := half_way(batch)) is not None:
                _, (wanted_there, given_there) = _both(task, network, index, (halves,))
                between.update(wanted_there, given_there, samples_in(halves))
    variance, distance = outputs.variance(), between.distance()
    return {
        "error": _largest(outputs.distance(), variance),
        "between": _largest(distance, variance) if between.samples else None,
        "alike": alike / outputs.samples if is_classes(task, wanted) else None,
        "samples": outputs.samples,
    }


def _both(task: Task, network: nn.Module, index: int, batches: Sequence[Batch]) -> tuple[Batch, list[Any]]:
    """What the original network and the joint one answer to the first batch that they take."""
    for batch in batches[:-1]:
        try:
            return batch, [run_batch(task, model, batch, index) for model in (task.model, network)]
        except InputError:  # the network is made for batches of one size
            continue
    return batches[-1], [run_batch(task, model, batches[-1], index) for model in (task.model, network)]


def _some(batch: Batch, count: int) -> Batch:
    """About so many samples from all over a batch."""
    size = samples_in(batch)
    step = max(1, size // count)
    return pytree.tree_map_only(Tensor, lambda x: x[::step] if x.dim() and len(x) == size else x, batch)


def _largest(distances: Sequence[float], variances: Sequence[float | None]) -> float | None:
    """The largest distance relative to the variance; None where no output varies."""
    return max((d / v for d, v in zip(distances, variances, strict=True) if v is not None), default=None)


def half_way(batch: Batch) -> Batch | None:
    """Means of neighbouring samples, some of them; None where samples are no numbers."""
    samples = samples_in(batch)
    numbers = [x for x in input_tensors(batch) if x.is_floating_point() and len(x) == samples]
    if samples < 2 or not numbers:
        return None
    chosen = {id(x) for x in numbers}
    return pytree.tree_map_only(Tensor, lambda x: (x + x.roll(1, 0)) / 2 if id(x) in chosen else x, batch)


class _Outputs:
    """The tensors of a network's output."""

    def __init__(self) -> None:
        self.samples = 0
        self._each: list[_Output] = []

    def update(self, wanted: Any, given: Any, samples: int) -> None:
        """The outputs of one batch, those of the original network and those of the joint one."""
        pairs = zip(pytree.tree_leaves(wanted), pytree.tree_leaves(given), strict=True)
        numbers = [(y, z) for y, z in pairs if isinstance(y, Tensor) and y.is_floating_point()]
        self._each = self._each or [_Output() for _ in numbers]
        for output, (y, z) in zip(self._each, numbers, strict=True):
            output.update(y, z)
        self.samples += samples

    def distance(self) -> list[float]:
        """Mean squared distance to the original, of each tensor."""
        return [output.distance / max(output.values, 1) for output in self._each]

    def variance(self) -> list[float | None]:
        """Mean squared distance of the original to the best constant answer; None where that is rounding."""
        return [output.variance() for output in self._each]


class _Output:
    """Sums over one tensor of a network's output, less its first values, so that little is lost.

    The constant answer has a value for every place of a sample; where samples differ in size, one value for all.
    """

    def __init__(self) -> None:
        self._origin: Tensor | None = None
        self._sums: list[Tensor] = []
        self.values = 0
        self._square = self._size = self.distance = 0.0

    def update(self, wanted: Tensor, given: Tensor) -> None:
        """The outputs of one batch, those of the original network and those of the joint one."""
        y, z = (x.double().reshape(len(x) if x.dim() else 1, -1) for x in (wanted, given))
        both = y.isfinite() & z.isfinite()
        y, z = y.where(both, 0), z.where(both, 0)
        self._origin = y[:1, :1] if self._origin is None else self._origin
        apart = y - self._origin
        self._sums.append(apart.sum(0))
        self.values += y.numel()
        self._square += float(apart.square().sum())
        self._size += float(y.square().sum())
        self.distance += float((y - z).square().sum())

    def variance(self) -> float | None:
        """The squared error of the best constant answer, per value; None where that is rounding."""
        if not self.values:
            return None
        places = len(self._sums[0]) if len({len(each) for each in self._sums}) == 1 else 1
        total = torch.stack([each.reshape(-1, places).sum(0) for each in self._sums]).sum(0)
        constant = self._square - float(total.square().sum()) * places / self.values
        return constant / self.values if constant > _CONSTANT * self._size else None


def _alike(task: Task, wanted: Any, given: Any) -> int:
    return int((wanted.argmax(1) == given.argmax(1)).sum()) if is_classes(task, wanted) else 0
