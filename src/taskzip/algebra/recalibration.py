"""Repairs without gradient steps, all from the sums that zipping has anyway: least squares, spread, batch-norm.

Weights here are matrices [units, d + 1] with the bias as the last column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from taskzip.algebra.curvature import LayerStatistics, Moments
from taskzip.algebra.factored import Factored, restricted
from taskzip.algebra.sparsity import fit, fit_on_support, solve_on_support, support

_ROUNDING = 1e-9
"""Corrections below this, relative to a unit's spread, are rounding: units that agree stay exactly as they are."""

_RARE = 1e-2
"""Mean squares of inputs are no smaller than this, relative to their mean over all inputs: what is rarely on would be
read with large weights that few rows tell."""

_MOST = 2.0
"""Scales are no larger, nor smaller than its inverse: what lost more than that is noise, or all but constant."""

_MOST_OWN = 10.0
"""The same for scales that are a task's own."""

SAME = 1e-5
"""Own scales and shifts nearer to none than this, relative to a unit's spread or size, are rounding of float32."""

_CONSTANT = 1e-6
"""A unit that varies less, relative to its mean square, does not vary."""


def least_squares(
    statistics: LayerStatistics, weights: Float[Tensor, "units d1"], ridge: float, *, bias: bool, pruned: bool = True
) -> Float[Tensor, "units d1"]:
    """Weights that, from the changed inputs, come closest to the original network's pre-activations.

    Design 2.5, point 2. Minimises sum |W x - z|^2 + ridge * sum_i G_ii |W_i - W_present,i|^2 with G = sum x x^T.

    Args:
        statistics: the sums over changed inputs x and original answers z.
        weights: the present weights, towards which the ridge pulls.
        ridge: its strength, relative to each input's own mean square.
        bias: whether the layer has a bias; without one the last column stays as it is, zero.
        pruned: whether weights that are 0 stay 0 (Sec. 3.6).
    """
    d = weights.shape[1] if bias else weights.shape[1] - 1
    h, present = restricted(statistics.curvature, slice(0, d)), weights[:, :d]
    exists = support(present, bias=bias) if pruned else None
    size = _mean_squares(h)
    if isinstance(h, Factored):
        root = size.sqrt() if ridge else torch.ones_like(size)
        solved = _fitted(h.rows / root, ridge, statistics.answers, present * root, exists) / root
    else:
        # What the data do not tell stays, however weak the ridge.
        pull = statistics.cross[:d] - h @ present.mT
        solved = present + solve_on_support(h + ridge * size.diag(), pull, exists).mT
    return solved if bias else torch.cat([solved, weights[:, d:]], dim=1)


def _mean_squares(h: Float[Tensor, "d d"] | Factored) -> Float[Tensor, " d"]:
    """The diagonal of a curvature; inputs that are rarely on count as having a small one."""
    own = h.rows.square().sum(0) if isinstance(h, Factored) else h.diagonal()
    return own.clamp_min(_RARE * own.mean() + torch.finfo(own.dtype).tiny)


def _fitted(
    rows: Float[Tensor, "n d"],
    ridge: float,
    answers: Float[Tensor, "n units"],
    present: Float[Tensor, "units d"],
    exists: Bool[Tensor, "units d"] | None,
) -> Float[Tensor, "units d"]:
    """Least squares over few rows of inputs of mean square 1: what they do not tell stays."""
    h = Factored(rows, torch.full_like(rows[0], ridge))
    solved = fit(h, answers, present)
    if exists is not None:
        pruned = (~exists.all(1)).nonzero().flatten()
        solved[pruned] = fit_on_support(h, answers[:, pruned], present[pruned], exists[pruned])
    return solved


def match_spread(
    statistics: Sequence[LayerStatistics],
    weights: Sequence[Float[Tensor, "units _"]],
    units: Sequence[Tensor],
    balance: Sequence[float],
) -> tuple[Float[Tensor, " units"], Float[Tensor, " units"]]:
    """By how much to scale the incoming weights of merged units, and to shift their bias (design 2.5, point 4).

    Least squares shrinks towards the mean, layer after layer. One scale and one shift per unit, common to all tasks,
    bring its pre-activations back to the original networks' variance and mean, both averaged over the tasks by their
    balance.

    Args:
        statistics: per task, the sums over the layer's inputs.
        weights: per task, all incoming weights of the merged units (shared and own), bias last.
        units: per task, which unit of the original network each merged unit stands for.
        balance: the weight of each task.

    Returns:
        Scales and shifts: the new weights are `scale * w`, then the bias is raised by `shift`.
    """
    wanted_mean = wanted_variance = mean = variance = torch.zeros((), dtype=weights[0].dtype, device=weights[0].device)
    for s, w, chosen, alpha in zip(statistics, weights, units, balance, strict=True):
        m, v = s.answer_moments()
        wanted_mean, wanted_variance = wanted_mean + alpha * m[chosen], wanted_variance + alpha * v[chosen]
        m, v = s.moments(w)
        mean, variance = mean + alpha * m, variance + alpha * v
    tiny = 1e-12 * (wanted_variance + wanted_mean.square()) + torch.finfo(variance.dtype).tiny
    ratio = (wanted_variance / variance.clamp_min(tiny)).sqrt().clamp(1 / _MOST, _MOST)
    scale = torch.where(variance > tiny, ratio, torch.ones_like(variance))
    scale = torch.where((scale - 1).abs() < _ROUNDING, torch.ones_like(scale), scale)
    shift = wanted_mean - scale * mean
    return scale, torch.where(shift.abs() < _ROUNDING * wanted_variance.sqrt(), torch.zeros_like(shift), shift)


def own_scale(
    statistics: LayerStatistics, weights: Float[Tensor, "units d1"], *, bias: bool
) -> tuple[Float[Tensor, " units"], Float[Tensor, " units"]]:
    """The scale and the shift with which units of these weights come closest to the original pre-activations.

    Least squares in two numbers for each unit; in the scale alone where it has no bias.

    Args:
        statistics: the sums over the layer's inputs and the original answers of the same units.
        weights: their incoming weights, bias last.
        bias: whether they have one.

    Returns:
        Scales and shifts: a unit gives `scale * w x + shift`.
    """
    mean, variance = statistics.moments(weights)
    wanted, spread = statistics.answer_moments()
    square = variance + mean.square()
    product = (weights * statistics.cross.mT).sum(1) / statistics.rows
    if bias:
        square, product = variance, product - mean * wanted
    tiny = _CONSTANT * (variance + mean.square()) + torch.finfo(square.dtype).tiny
    ratio = (product / square.clamp_min(tiny)).clamp(1 / _MOST_OWN, _MOST_OWN)
    # Equal units of two networks stay equal to the last bit: rounding must not tell them apart.
    scale = torch.where((square > tiny) & ((ratio - 1).abs() > SAME), ratio, torch.ones_like(ratio))
    shift = wanted - scale * mean if bias else torch.zeros_like(mean)
    return scale, torch.where(shift.abs() > SAME * spread.sqrt(), shift, torch.zeros_like(shift))


def batch_norm_statistics(
    old: Moments, new: Moments, mean: Float[Tensor, " units"], variance: Float[Tensor, " units"], eps: float
) -> Moments:
    """Running statistics under which batch-norm gives new pre-activations the mean and spread that the old ones had.

    The change is relative: where new and old ones agree on the calibration data, the statistics stay (design 2.4).

    Args:
        old: mean and variance of the original network's pre-activations, per unit.
        new: those of the changed network's.
        mean, variance, eps: of the batch-norm at present.
    """
    (old_mean, old_variance), (new_mean, new_variance) = old, new
    ratio = torch.where(old_variance > 1e-12 * (variance + eps), new_variance / old_variance, torch.ones_like(variance))
    return new_mean - (old_mean - mean) * ratio.sqrt(), ((variance + eps) * ratio - eps).clamp_min(0)
