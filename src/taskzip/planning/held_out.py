"""How good a network is on held-out data of its task, by a metric of which higher values are better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from taskzip.errors import InputError
from taskzip.planning.plan import MaxDrop, Metric
from taskzip.tasks import Task, answers, class_axis, evaluating, input_tensors, is_cross_entropy, run_batch


class Values(NamedTuple):
    """What a metric gave, sample by sample or batch by batch, float64 [n], and how much each counts."""

    values: Tensor
    weights: Tensor

    @property
    def mean(self) -> float:
        """The metric on all data."""
        return float(self.values @ self.weights / self.weights.sum())


class Judge:
    """Measures networks of one task.

    Attributes:
        samples: how many samples the held-out data hold; known once the original network was measured.
        original: what the original network reaches.
    """

    def __init__(self, task: Task, wanted: MaxDrop) -> None:
        """Measure the original network.

        Raises:
            InputError: no metric, data or targets that cannot be used, or a metric that is not a finite number.
        """
        self._task = replace(task, data=wanted.data[task.name])
        self._metric: Metric | None = wanted.metric_of(task.name) or task.metric
        if self._metric is None and not is_cross_entropy(task):
            raise InputError(
                f"task {task.name!r}: its loss is not cross-entropy, so that accuracy says nothing: give it a metric."
            )
        for index, batch in enumerate(self._task.data):
            if not input_tensors(batch):
                raise self._error(index, "holds no tensor of samples")
        self.samples = 0
        self.original = self.measure(task.model)

    def loss(self, reached: Values, quantile: float) -> float:
        """What another network loses, and so many standard errors more, from the differences sample by sample."""
        difference, weights = self.original.values - reached.values, reached.weights
        mean = difference @ weights / weights.sum()
        apart = (weights * (difference - mean)).square().sum() * len(weights) / max(len(weights) - 1, 1)
        return float(mean + quantile * apart.sqrt() / weights.sum())

    def measure(self, network: nn.Module) -> Values:
        """The metric on all samples."""
        parts, samples = [], 0
        with evaluating(network):
            for index, batch in enumerate(self._task.batches()):
                count = len(input_tensors(batch)[0])
                output, targets = run_batch(self._task, network, batch, index), self._task.targets(batch)
                if targets is None:
                    raise self._error(index, "has no targets: pass (inputs, targets), or dicts with 'labels'")
                parts.append(self._values(output, targets, count, index))
                samples += count
        found = Values(*(torch.cat(each).cpu() for each in zip(*parts, strict=True))) if parts else None
        if found is None or not found.weights.sum() or self.samples not in (0, samples):
            raise InputError(
                f"task {self._task.name!r}: its held-out data have {samples} samples, and "
                f"{self.samples or 'at least one'} were expected: pass data that can be read again and again."
            )
        self.samples = samples
        return found

    def _values(self, output: Any, targets: Any, count: int, index: int) -> Values:
        if self._metric is None:
            return self._accuracy(output, targets, index)
        value = self._metric(output, targets)
        try:
            values = torch.as_tensor(value).detach().double()
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._error(index, f"gives {value!r} as its metric, which is no number") from error
        if values.numel() != 1 and len(values) != count:
            raise self._error(index, f"gives a metric of shape {tuple(values.shape)} for {count} samples")
        if not values.isfinite().all():
            raise self._error(index, f"gives {float(values.mean())} as its metric")
        means = values.reshape(len(values) if values.numel() > 1 else 1, -1).mean(1)
        return Values(means, torch.full_like(means, count / len(means)))

    def _accuracy(self, output: Any, targets: Any, index: int) -> Values:
        """Right answers in percent; targets that the loss ignores do not count."""
        found = answers(output)
        name, scores = next(iter(found.items())) if len(found) == 1 else ("", torch.empty(0))
        axis = class_axis(scores, targets, name)
        if axis is None:
            raise self._error(index, "gives no tensor with classes along axis 1 or the last: give the task a metric")
        targets = targets.argmax(axis) if targets.is_floating_point() else targets
        counted = targets != getattr(self._task.loss, "ignore_index", -100)
        right = (scores.argmax(axis) == targets) & counted
        weights, hits = (each.reshape(len(targets), -1).sum(1, dtype=torch.float64) for each in (counted, right))
        return Values(100 * hits / weights.clamp_min(1), weights)

    def _error(self, index: int, what: str) -> InputError:
        return InputError(f"task {self._task.name!r}: batch {index} of its held-out data {what}.")


def judges(tasks: Sequence[Task], wanted: MaxDrop) -> dict[str, Judge]:
    """One for each task.

    Raises:
        InputError: data or metrics for other tasks than these, or that cannot be used.
    """
    names = [task.name for task in tasks]
    metrics = wanted.metric if isinstance(wanted.metric, Mapping) else {}
    for what, given in (("data", wanted.data), ("metric", metrics)):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise InputError(f"MaxDrop: {what} names task {unknown[0]!r}; the tasks are {', '.join(names)}.")
    missing = [name for name in names if name not in wanted.data]
    if missing:
        raise InputError(f"MaxDrop: no held-out data for task {missing[0]!r}.")
    return {task.name: Judge(task, wanted) for task in tasks}
