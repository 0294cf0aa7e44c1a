"""A zip measures itself: no step may make a layer's error larger than leaving it out, on the calibration rows.

All from the sums that zipping has anyway: with G = sum x x^T, C = sum x z^T and the moments of the original answers z,
the error of any weights w of a unit is mean (w x - z)^2 = w^T G w / n - 2 w^T C / n + mean z^2, without another pass.
Sums cannot tell in which order their rows were paired; that is what `orders` is for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from taskzip.algebra.curvature import LayerStatistics, Moments
from taskzip.algebra.factored import Factored, quadratic
from taskzip.errors import GraphError

MUCH = 0.1
"""A step that raises the mean error of a layer's units by this part of what they vary is a fault, no rounding."""

_ROUNDING = 1e-3
"""What is left below this part, relative to what a unit varies, is rounding."""

_WORK = 2**26
"""Multiplications for the measures of one layer: of larger ones some units are looked at."""

_LOST = 0.5
"""With an error above this, relative to its variance, a unit may stand in the place of another one."""


def some(units: int, columns: int, device: torch.device | None = None) -> Int[Tensor, " some"]:
    """The units that are measured: all of them, or evenly many of those of a large layer."""
    most = max(16, _WORK // max(columns, 1) ** 2)
    return torch.arange(0, units, -(-units // most) or 1, device=device)


def layer_errors(
    statistics: LayerStatistics, weights: Float[Tensor, "some d1"], units: Int[Tensor, " some"]
) -> Float[Tensor, " some"]:
    """Mean squared distance of what units with these weights (bias last) answer to what the original ones did."""
    mean, variance = _answers(statistics, units)
    covariance, spread = statistics.covariance(), statistics.rows**0.5
    if isinstance(covariance, Factored):
        answers = (statistics.answers[:, units] - torch.outer(_counts(statistics), mean)) / spread
        left = (covariance.rows @ weights.mT - answers).square().sum(0)
    else:
        together = _cross_covariance(statistics, units)
        left = quadratic(covariance, weights) - 2 * (weights * together.mT).sum(1) + variance
    return left.clamp_min(0) + (weights @ statistics.input_mean() - mean).square()


def scales(
    statistics: LayerStatistics, weights: Float[Tensor, "some d1"], units: Int[Tensor, " some"]
) -> Float[Tensor, " some"]:
    """What errors are compared with: the variance of the original answers, and what rounding makes of large sums."""
    mean, variance = _answers(statistics, units)
    sizes = weights.abs() @ _mean_squares(statistics).sqrt()
    return variance + 1e-3 * mean.square() + 1e-6 * sizes.square() + torch.finfo(variance.dtype).tiny


def check_reading(where: str, statistics: LayerStatistics, weights: Float[Tensor, "units d1"]) -> None:
    """Of a layer whose inputs nothing has changed: what it reads and what it answers belong together.

    Raises:
        GraphError: they do not.
    """
    units = some(len(weights), weights.shape[1], weights.device)
    error = layer_errors(statistics, weights[units], units) / scales(statistics, weights[units], units)
    if error.numel() and float(error.mean()) > MUCH:
        raise _fault(where, "what it reads does not give what it answers", error)


def checked_fit(
    where: str, statistics: LayerStatistics, present: Float[Tensor, "units d1"], solved: Float[Tensor, "units d1"]
) -> Float[Tensor, "units d1"]:
    """The weights of least squares, or the present ones of a unit that these bring nearer to its original answers.

    Raises:
        GraphError: they raise the error of the layer by much, or its units stand in another order than their answers.
    """
    units = some(len(present), present.shape[1], present.device)
    if not len(units):
        return solved
    scale = scales(statistics, present[units], units)
    before = layer_errors(statistics, present[units], units)
    rise = (layer_errors(statistics, solved[units], units) - before) / scale
    if float(rise.mean()) > MUCH:
        raise _fault(where, "least squares raises its error", rise)
    if float((before / scale).mean()) > _LOST:
        _check_places(where, statistics, present[units], units)
    worse = units[rise > _ROUNDING]
    return solved.index_copy(0, worse, present[worse]) if len(worse) else solved


def _check_places(
    where: str, statistics: LayerStatistics, weights: Float[Tensor, "some d1"], units: Int[Tensor, " some"]
) -> None:
    """Units that answer badly in their own places, and well in each other's, were put into a wrong order."""
    _, variance = _answers(statistics, units)
    present = quadratic(statistics.covariance(), weights)
    if (alive := variance > 0).sum() < 2:
        return
    pairs = present[:, None] - 2 * weights @ _cross_covariance(statistics, units) + variance
    errors = (pairs / variance).clamp_max(2)[alive][:, alive]
    given = float(errors.diagonal().mean())
    best = float(errors.cpu().numpy()[linear_sum_assignment(errors.cpu().numpy())].mean())
    if given > _LOST and best < given / 4:
        raise _fault(where, "its units stand in another order than their answers", errors.diagonal())


def check_merging(
    where: str,
    statistics: Sequence[LayerStatistics],
    weighing: Sequence[float],
    changes: Sequence[Float[Tensor, "rows d1"]],
    present: Sequence[Float[Tensor, "rows d1"]],
    promised: Float[Tensor, " pairs"],
    *,
    counts: Sequence[Float[Tensor, " pairs"]],
    centred: Sequence[bool],
) -> None:
    """Merging pairs costs what was promised when they were paired (d, eq. 12), and no more.

    Args:
        where: the layer.
        statistics: per owner of the merged units, what it reads.
        weighing: per owner, balance / samples.
        changes: per owner, by how much the rows of its units were changed, pair by pair.
        present: the rows before.
        promised: d of each pair.
        counts: per owner, how much its error of each pair counts, at most 1.
        centred: per owner, whether batch-norm or a shift of the task's own takes the mean off again.

    Raises:
        GraphError: it costs more by much of what the units' answers vary.
    """
    pairs = len(promised)
    if not pairs:
        return
    height = len(changes[0]) // pairs
    chosen = some(pairs, changes[0].shape[1], promised.device)
    cost, whole = (torch.zeros(len(chosen), dtype=torch.float64, device=promised.device) for _ in range(2))
    owners = zip(statistics, weighing, changes, present, counts, centred, strict=True)
    for s, weight, change, before, count, free in owners:
        rows = change.unflatten(0, (pairs, height))[chosen].flatten(0, 1)
        was = before.unflatten(0, (pairs, height))[chosen].flatten(0, 1)
        total = weight * s.rows / 2 * count[chosen]
        covariance = s.covariance()
        shift = torch.zeros_like(rows[:, 0]) if free else (rows @ s.input_mean()).square()
        cost += total * (quadratic(covariance, rows) + shift).unflatten(0, (-1, height)).sum(1)
        whole += total * quadratic(covariance, was).unflatten(0, (-1, height)).sum(1)
    excess = (cost - promised[chosen].double()).clamp_min(0)
    if float(excess.sum()) > MUCH * float(whole.sum()) and float(excess.sum()) > MUCH * float(cost.sum()):
        raise _fault(where, "merging its units costs more than their functional difference", excess / whole)


def check_pairing(where: str, difference: Float[Tensor, "a b"], cost: Float[Tensor, " pairs"]) -> None:
    """Pairs that are the cheapest are not dearer than as many units paired in the order in which they stand.

    Raises:
        GraphError: they are, by much.
    """
    given = difference.diagonal()
    if len(cost) and float(cost.sum()) > (1 + MUCH) * float(given.sort().values[: len(cost)].sum()):
        raise GraphError(
            f"{where}: its pairs are dearer than units paired in the order in which they stand; this is a "
            f"fault of taskzip: please report the network."
        )


def spread_is_better(
    where: str,
    wanted: Sequence[Moments],
    before: Sequence[Moments],
    after: Sequence[Moments],
    balance: Sequence[float],
) -> Bool[Tensor, " units"]:
    """Which units come nearer to their original mean and spread, averaged over the tasks; the others stay.

    Args:
        where: the layer.
        wanted: per task, the moments of the original answers.
        before, after: those with the weights before and after.
        balance: the weight of each task.

    Raises:
        GraphError: the layer's units come to lie farther from them by much.
    """
    aim = _averaged(wanted, balance)
    rise = _apart(_averaged(after, balance), aim, aim[1]) - _apart(_averaged(before, balance), aim, aim[1])
    if rise.numel() and float(rise.mean()) > MUCH:
        raise _fault(where, "the spread of its units comes to lie farther from the original's", rise)
    return rise <= _ROUNDING


def checked_batch_norm(where: str, old: Moments, new: Moments, before: Moments, after: Moments, eps: float) -> Moments:
    """The running statistics that bring normalised units nearer to what they were, unit by unit.

    Args:
        where: task and layer.
        old, new: moments of the original units and of the present ones.
        before, after: the running mean and variance that there were, and those that follow.
        eps: of the batch-norm.

    Raises:
        GraphError: with those that follow the units are farther from what they were, by much.
    """
    aim = _normalised(old, before, eps)
    one = torch.ones_like(aim[1])
    rise = _apart(_normalised(new, after, eps), aim, one) - _apart(_normalised(new, before, eps), aim, one)
    alive = (before[1] + eps) * new[1] > 2 * eps * old[1]  # of what has become constant, epsilon hides the rest
    if alive.any() and float(rise[alive].mean()) > MUCH:
        raise _fault(where, "its batch-norm's statistics come to lie farther from its units", rise)
    better = rise <= _ROUNDING
    return torch.where(better, after[0], before[0]), torch.where(better, after[1], before[1])


def check_assembled(where: str, before: Tensor, after: Tensor) -> None:
    """The blocks of a layer make up the weights that were merged.

    Raises:
        GraphError: they do not.
    """
    if not torch.equal(before, after):
        apart = float((before - after).abs().max() / before.abs().max())
        raise GraphError(
            f"{where}: its blocks make up other weights than were merged (off by {apart:.1%}); this is a fault of "
            f"taskzip: please report the network."
        )


def _fault(where: str, what: str, rise: Tensor) -> GraphError:
    return GraphError(
        f"{where}: {what}, by {float(rise.mean()):.1%} of what its units vary on the calibration data. The network was "
        f"read wrongly: please report it; `share` by layer leaves the layer out, or compensate=False the step."
    )


def _averaged(moments: Sequence[Moments], balance: Sequence[float]) -> Moments:
    mean, variance = (sum(b * each[k] for b, each in zip(balance, moments, strict=True)) for k in (0, 1))
    assert isinstance(mean, Tensor) and isinstance(variance, Tensor)
    return mean, variance


def _normalised(moments: Moments, running: Moments, eps: float) -> Moments:
    whole = running[1] + eps
    return (moments[0] - running[0]) / whole.sqrt(), moments[1] / whole


def _apart(moments: Moments, aim: Moments, unit: Tensor) -> Tensor:
    """The squared distance of normal distributions with these moments (Wasserstein's), relative."""
    tiny = 1e-6 * aim[0].square() + torch.finfo(unit.dtype).tiny
    return ((moments[0] - aim[0]).square() + (moments[1].sqrt() - aim[1].sqrt()).square()) / (unit + tiny)


def _answers(statistics: LayerStatistics, units: Tensor) -> Moments:
    mean, variance = statistics.answer_moments()
    return mean[units].double(), variance[units]


def _counts(statistics: LayerStatistics) -> Tensor:
    """The constant input of each row of a factored curvature."""
    h = statistics.curvature
    assert isinstance(h, Factored)
    return h.rows[:, -1]


def _mean_squares(statistics: LayerStatistics) -> Tensor:
    h = statistics.curvature
    return (h.rows.square().sum(0) if isinstance(h, Factored) else h.diagonal()) / statistics.rows


def _cross_covariance(statistics: LayerStatistics, units: Tensor) -> Tensor:
    """Of inputs and original answers, [d1, some]."""
    mean, _ = _answers(statistics, units)
    return statistics.cross[:, units] / statistics.rows - torch.outer(statistics.input_mean(), mean)
