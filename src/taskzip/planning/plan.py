"""How much to share.

`Share` and `Threshold` say how much of each layer: a fraction or a count (N~_l), or up to which functional difference
(epsilon_l). `Budget` and `MaxDrop` say what is to come of it, and `search` finds the `Share`.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from statistics import NormalDist
from typing import Any, NamedTuple

from taskzip.errors import InputError, TaskzipWarning
from taskzip.naming import key_of


class Quota(NamedTuple):
    """What one layer may share, each time that a task is added.

    Attributes:
        pairs: at most so many pairs, where as many can be paired as at any time in this layer.
        threshold: each with d <= this, where it is given.
        in_proportion: whether a smaller network shares in proportion less.
    """

    pairs: int
    threshold: float | None = None
    in_proportion: bool = False

    def of(self, units: int, most: int) -> Quota:
        """What a task may share of which only so many units can be paired, where `most` can be at any time."""
        return self._replace(pairs=round(self.pairs * units / most)) if self.in_proportion and units < most else self

    def divided(self, units: Sequence[int]) -> list[Quota]:
        """The quota over parts of so many units, in proportion."""
        ends = [round(self.pairs * end / max(sum(units), 1)) for end in itertools.accumulate(units, initial=0)]
        return [self._replace(pairs=end - start) for start, end in itertools.pairwise(ends)]


@dataclass(frozen=True)
class Threshold:
    """Share every pair whose functional difference d (eq. 12) is at most `eps`.

    Args:
        eps: one number for all layers, or a dict by layer name or glob ("encoder.*"); a layer that the dict leaves out
            shares nothing.
    """

    eps: float | Mapping[str, float]

    def __post_init__(self) -> None:
        for where, eps in self.eps.items() if isinstance(self.eps, Mapping) else [("all layers", self.eps)]:
            if not _is_number(eps) or not eps >= 0:
                raise InputError(f"Threshold for {where}: {eps!r} is not a number >= 0.")

    def named(self) -> Iterable[str]:
        """The layers that are named one by one."""
        return self.eps.keys() if isinstance(self.eps, Mapping) else ()

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"threshold": _plain(self.eps)}

    def quota(self, layer: str, units: int) -> Quota:
        """What `layer`, with `units` pairs at most, may share."""
        eps = _of_layer(layer, self.eps)
        return Quota(0) if eps is None else Quota(units, float(eps))


@dataclass(frozen=True)
class Share:
    """Share a fraction (float, 0 to 1) or a count (int) of a layer's units, in all layers or by layer name or glob.

    The whole is the smaller of the two layers that meet. A layer that a dict leaves out shares nothing. A count that a
    glob gives is at most that whole.
    """

    amount: float | Mapping[str, float]

    def __post_init__(self) -> None:
        if isinstance(self.amount, Mapping):
            for layer, amount in self.amount.items():
                if not _is_number(amount) or amount < 0 or (not isinstance(amount, Integral) and amount > 1):
                    raise InputError(
                        f"share for layer {layer!r} is {amount!r}: give a fraction (float, 0 to 1) or a count (int)."
                    )
        elif not _is_number(self.amount) or not 0 <= self.amount <= 1:
            raise InputError(f"share is {self.amount!r}: give a fraction from 0 to 1, a dict by layer name, or a plan.")
        elif isinstance(self.amount, Integral) and self.amount:
            raise InputError(
                f"share={self.amount!r} could mean all units or one: write share=1.0 for all units of every layer, or "
                f'share={{"*": 1}} for one unit of each.'
            )

    def named(self) -> Iterable[str]:
        """The layers that are named one by one."""
        return self.amount.keys() if isinstance(self.amount, Mapping) else ()

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"share": _plain(self.amount)}

    def quota(self, layer: str, units: int) -> Quota:
        """What `layer`, with `units` pairs at most, may share.

        Raises:
            InputError: a count above the number of units, of a layer that is named itself.
        """
        amount = 0 if (given := _of_layer(layer, self.amount)) is None else given
        if not isinstance(amount, Integral):
            return Quota(round(amount * units), in_proportion=True)
        if amount > units and isinstance(self.amount, Mapping) and layer in self.amount:
            raise InputError(
                f"share for layer {layer!r} asks for {amount} shared units, but the smaller network has {units}."
            )
        return Quota(min(int(amount), units))

    def warn_of_ones(self) -> None:
        """Say that an int 1 is one unit, unless another count shows that counts are meant."""
        given = self.amount if isinstance(self.amount, Mapping) else {}
        counts = {layer: n for layer, n in given.items() if isinstance(n, Integral)}
        if max(counts.values(), default=0) == 1:
            one = next(layer for layer, n in counts.items() if n == 1)
            warnings.warn(
                f"share={{{one!r}: 1}} shares one unit, because 1 is a count (int): write 1.0 for all units; one unit "
                f"without this warning is a fraction, such as 1/16 of 16 units.",
                TaskzipWarning,
                stacklevel=3,
            )


@dataclass(frozen=True)
class Budget:
    """The sharing of least cost that fits a size: least summed functional difference, relative per layer (`curves`).

    Args:
        size: of the joint network: a float in (0, 1] is the fraction of the separate networks' parameters together; an
            int above 100 is bytes, parameters times element size.

    Raises:
        InputError: a size that is neither.
    """

    size: float

    def __post_init__(self) -> None:
        is_bytes = isinstance(self.size, Integral)
        if not _is_number(self.size) or self.size <= 0 or (not is_bytes and self.size > 1):
            raise InputError(
                f"Budget({self.size!r}): give a fraction of the separate networks (float, above 0 to 1) or bytes (int)."
            )
        if is_bytes and self.size <= _PERCENT:
            fraction = 1.0 if self.size == 1 else float(self.size) / _PERCENT
            raise InputError(
                f"Budget({self.size!r}) would be bytes, and no network is so small: write Budget({fraction}) for a "
                f"fraction of the separate networks (float, above 0 to 1), or more bytes (int, above {_PERCENT})."
            )

    def named(self) -> Iterable[str]:
        """The layers that are named one by one: none."""
        return ()

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"budget": _plain(self.size)}


_PERCENT = 100
"""No network is so few bytes; as percent it would be one."""

Metric = Callable[[Any, Any], Any]
"""`metric(output, targets)` of a batch, higher is better: a number, or a tensor with one value per sample."""


@dataclass(frozen=True)
class MaxDrop:
    """The sharing that saves most parameters while no task loses more than `points` on held-out data.

    Args:
        points: what a task may lose, in the unit of its metric; percentage points where that is accuracy.
        data: by task name, a re-iterable of batches with targets, in the forms of `Task.data`; neither the calibration
            data nor a test set.
        metric: `metric(output, targets)` for all tasks or by task name, averaged over the samples; higher is better. It
            gives a number for the batch, or a tensor with one value per sample. Default: `Task.metric`, else accuracy
            in percent where the task's loss is cross-entropy (classes along axis 1).
        confidence: how sure it is to be that a task does not lose more on other data of the kind: an upper confidence
            bound of its loss stays within `points`, from how much the loss varies over the held-out samples. It counts
            that the best of up to `evaluations` networks is taken (Bonferroni's correction). None: the measured loss
            itself stays within `points`.
        evaluations: at most so many joint networks are made and measured, at least 2.

    Raises:
        InputError: an argument that cannot be used.
    """

    points: float
    data: Mapping[str, Iterable[Any]]
    metric: Metric | Mapping[str, Metric] | None = None
    confidence: float | None = 0.95
    evaluations: int = 16

    def __post_init__(self) -> None:
        if not _is_number(self.points) or self.points < 0:
            raise InputError(f"MaxDrop: points={self.points!r} must be a number >= 0.")
        if not isinstance(self.data, Mapping):
            raise InputError("MaxDrop: data must be a dict from task names to batches with targets.")
        for name, batches in self.data.items():
            if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
                raise InputError(
                    f"MaxDrop: data of task {name!r} is a {type(batches).__name__}, but it is read many times: pass "
                    f"list(...) or a DataLoader."
                )
        for metric in self.metric.values() if isinstance(self.metric, Mapping) else [self.metric]:
            if metric is not None and not callable(metric):
                raise InputError(f"MaxDrop: metric {metric!r} must be a function of output and targets.")
        if self.confidence is not None and (not _is_number(self.confidence) or not 0.5 <= self.confidence < 1):
            raise InputError(f"MaxDrop: confidence={self.confidence!r} must be None or a number from 0.5 to below 1.")
        if not isinstance(self.evaluations, Integral) or isinstance(self.evaluations, bool) or self.evaluations < 2:
            raise InputError(f"MaxDrop: evaluations={self.evaluations!r} must be a whole number >= 2.")

    def named(self) -> Iterable[str]:
        """The layers that are named one by one: none."""
        return ()

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "max_drop": float(self.points),
            "confidence": None if self.confidence is None else float(self.confidence),
        }

    @property
    def quantile(self) -> float:
        """By so many standard errors the bound of one network's loss is above its measured loss."""
        return 0.0 if self.confidence is None else NormalDist().inv_cdf(1 - (1 - self.confidence) / self.evaluations)

    def metric_of(self, task: str) -> Metric | None:
        """The metric given for a task."""
        return self.metric.get(task) if isinstance(self.metric, Mapping) else self.metric


SharePlan = Share | Threshold
SearchPlan = Budget | MaxDrop


def as_plan(share: float | Mapping[str, float] | SharePlan) -> SharePlan:
    """Read the `share` argument of `zip`.

    Raises:
        InputError: anything that is not a fraction, a dict or a plan.
    """
    if isinstance(share, (Share, Threshold)):
        return share
    return Share(share)


def _of_layer(layer: str, amounts: float | Mapping[str, float]) -> float | None:
    """What is said of a layer: for all layers alike, by its name or by a glob; None where nothing is."""
    if not isinstance(amounts, Mapping):
        return amounts
    key = key_of(layer, amounts)
    return None if key is None else amounts[key]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _plain(amount: float | Mapping[str, float]) -> object:
    """Numbers as JSON knows them."""
    if isinstance(amount, Mapping):
        return {layer: _plain(each) for layer, each in amount.items()}
    return int(amount) if isinstance(amount, Integral) else float(amount)
