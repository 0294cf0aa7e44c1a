"""Curvature of a layer's error: sum x x^T over what its units read, which alpha / n makes H of eq. 7 and 8.

The last input is fixed to 1, so that the bias is one more incoming weight. The same pass also keeps what the original
network answered at those inputs, because least squares (`recalibration`) and the curvature need the same rows.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from jaxtyping import Float
from torch import Tensor

from taskzip.algebra.factored import Factored, dense, quadratic, restricted

_SMALL = 1024
"""Up to so many columns rows are summed up however few they are: the matrices are small."""

_BLOCK = 512
"""Columns of the blocks in which a larger one is summed up."""

_FEW = 0.25
"""Rows per column up to which they are kept: with more, the span of two tasks' rows costs what matrices cost."""


Moments = tuple[Float[Tensor, " units"], Float[Tensor, " units"]]
"""Mean and variance of each unit."""


class _Sums(NamedTuple):
    gram: Tensor  # sum x x^T
    cross: Tensor  # sum x z^T


class _Rows(NamedTuple):
    x: Tensor
    z: Tensor
    weight: float


class LayerStatistics:
    """Sums over the rows that one layer of one task read, and over what its units should answer there.

    The answers are summed up less a constant near their mean, because a unit's spread may be far below its mean. Where
    rows are few for the number of inputs, they are kept as they are, and the curvature is factored (design 2.6).

    Attributes:
        parts: the sums over the rows that were not held out, and over those that were; None where none were.
    """

    def __init__(self, inputs: int, units: int, device: torch.device) -> None:
        self._columns = inputs + 1
        self._square = torch.zeros(units, dtype=torch.float64, device=device)
        self._origin: Tensor | None = None
        self._kept: list[_Rows] = []
        self._sums: _Sums | None = None
        self.parts: tuple[LayerStatistics, LayerStatistics] | None = None
        if self._columns <= _SMALL:
            self._sum_up()

    def update(self, rows: Float[Tensor, "rows d"], answers: Float[Tensor, "rows units"], weight: float = 1.0) -> None:
        """Add rows; `weight` says how many rows each of them stands for (sampling leaves the sums unbiased)."""
        if self._origin is None:
            self._origin = answers.mean(0)
        if not len(rows):
            return
        x = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)
        z = answers - self._origin
        self._kept.append(_Rows(x, z, weight))
        self._square += weight * z.square().sum(0)
        if self._sums or sum(len(each.x) for each in self._kept) > _FEW * self._columns:
            self._sum_up()

    def with_held_out(self, held: LayerStatistics) -> LayerStatistics:
        """The sums over these rows and over those that were held out, whose answers have the same origin."""
        total = LayerStatistics(self._columns - 1, len(self._square), self._square.device)
        total._origin, total._square = self._origin, self._square + held._square
        total._kept = self._kept + held._kept
        sums = [each._sums for each in (self, held) if each._sums]
        if sums:
            total._sums = _Sums(*(torch.stack(each).sum(0) for each in zip(*sums, strict=True)))
        if total._sums or sum(len(each.x) for each in total._kept) > _FEW * total._columns:
            total._sum_up()
        total.parts = (self, held)
        return total

    def _sum_up(self) -> None:
        """Rows that were kept become sums."""
        if self._sums is None:
            zeros = self._square.new_zeros
            self._sums = _Sums(zeros(self._columns, self._columns), zeros(self._columns, len(self._square)))
        for x, z, weight in self._kept:
            self._sums.gram.add_(weight * _gram(x))
            self._sums.cross.add_(weight * (x.mT @ z))
        self._kept.clear()

    def held_out_beside(self, answers: Float[Tensor, "rows units"]) -> LayerStatistics:
        """Sums of other rows, still empty, that `with_held_out` takes; some answers tell where these begin."""
        if self._origin is None:
            self._origin = answers.mean(0)
        held = LayerStatistics(self._columns - 1, len(self._square), self._square.device)
        held._origin = self._origin
        return held

    def of_units(self, units: Tensor) -> LayerStatistics:
        """The same rows, with the answers of some units."""
        some = LayerStatistics(self._columns - 1, len(units), self._square.device)
        some._square = self._square[units]
        some._origin = None if self._origin is None else self._origin[units]
        some._kept = [each._replace(z=each.z[:, units]) for each in self._kept]
        some._sums = self._sums and self._sums._replace(cross=self._sums.cross[:, units])
        return some

    def is_finite(self) -> bool:
        """Whether no NaN or infinity was read."""
        inputs = self._sums.gram.diagonal() if self._sums else self._totals[0]
        return bool(torch.isfinite(inputs).all() and torch.isfinite(self._square).all())

    @property
    def rows(self) -> float:
        """How many rows (samples times output positions) the sums stand for."""
        return float(self._totals[0][-1])

    @property
    def curvature(self) -> Float[Tensor, "d1 d1"] | Factored:
        """sum x x^T, the last input being the constant 1; factored where rows are few."""
        return self._sums.gram if self._sums else self._factored()

    @property
    def gram(self) -> Float[Tensor, "d1 d1"]:
        """The same as a matrix, however large."""
        return dense(self.curvature)

    @property
    def cross(self) -> Float[Tensor, "d1 units"]:
        """sum x z^T, z being the pre-activations of the original network."""
        if not self._sums:
            return self._factored().rows.mT @ self.answers
        gram, cross = self._sums
        return cross if self._origin is None else cross + torch.outer(gram[-1], self._origin.double())

    @property
    def answers(self) -> Float[Tensor, "n units"]:
        """What the original network answered at the rows of a factored curvature, weighted as these are."""
        assert self._origin is not None
        return torch.cat([weight**0.5 * (z.double() + self._origin) for _, z, weight in self._kept])

    @property
    def square(self) -> Float[Tensor, " units"]:
        """sum z^2."""
        if self._origin is None:
            return self._square
        origin = self._origin.double()
        return self._square + 2 * origin * self._totals[1] + self.rows * origin.square()

    def answer_moments(self) -> Moments:
        """Mean and variance of the original network's pre-activations, per unit."""
        mean = self._totals[1] / self.rows
        variance = (self._square / self.rows - mean.square()).clamp_min(0)
        return mean if self._origin is None else mean + self._origin, variance

    def moments(self, weights: Float[Tensor, "units d1"]) -> Moments:
        """Mean and variance of what units with these incoming weights (bias last) answer on the same rows."""
        mean, free = self.input_mean(), slice(0, -1)
        variance = quadratic(restricted(self.covariance(), free), weights[:, free])
        return weights @ mean, variance.clamp_min(0)

    def input_mean(self) -> Float[Tensor, " d1"]:
        """Mean of the inputs over the rows, that of the constant one being 1."""
        return self._totals[0] / self.rows

    def covariance(self) -> Float[Tensor, "d1 d1"] | Factored:
        """Covariance of the inputs over the rows; the constant input has none."""
        h, mean = self.curvature, self.input_mean()
        if isinstance(h, Factored):
            return Factored((h.rows - torch.outer(h.rows[:, -1], mean)) / self.rows**0.5, h.diagonal)
        return h / self.rows - torch.outer(mean, mean)

    @property
    def _totals(self) -> tuple[Tensor, Tensor]:
        """The sums of x and of z."""
        if self._sums:
            return self._sums.gram[-1], self._sums.cross[-1]
        x = torch.stack([weight * x.double().sum(0) for x, _, weight in self._kept])
        z = torch.stack([weight * z.double().sum(0) for _, z, weight in self._kept])
        return x.sum(0), z.sum(0)

    def _factored(self) -> Factored:
        rows = torch.cat([weight**0.5 * x.double() for x, _, weight in self._kept])
        return Factored(rows, rows.new_zeros(self._columns))


def _gram(x: Float[Tensor, "rows d"]) -> Float[Tensor, "d d"]:
    """x^T x, symmetric to the last bit; where it is large, blocks below the diagonal are copies of those above."""
    d = x.shape[1]
    if d <= _SMALL:
        return _symmetric(x.mT @ x)
    gram = x.new_empty(d, d)
    for start in range(0, d, _BLOCK):
        stop = min(start + _BLOCK, d)
        gram[start:stop, start:] = x[:, start:stop].mT @ x[:, start:]
        gram[start:stop, start:stop] = _symmetric(gram[start:stop, start:stop].clone())
        gram[stop:, start:stop] = gram[start:stop, stop:].mT
    return gram


def _symmetric(gram: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """With what lies below the diagonal above it, too: rounding differs. Writes into the matrix."""
    return gram.tril_().add_(gram.tril(-1).mT)


@overload
def damped(h: Tensor, damping: float) -> Tensor: ...
@overload
def damped(h: Factored, damping: float) -> Factored: ...
def damped(h: Float[Tensor, "d d"] | Factored, damping: float) -> Float[Tensor, "d d"] | Factored:
    """H + damping * mean(diag(H)) * I: where the data say nothing, each task's own weights are the prior."""
    if isinstance(h, Factored):
        return h.damped(damping)
    if not len(h):
        return h
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)


def solve_symmetric(h: Float[Tensor, "d d"], right: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """H^-1 right for a positive semidefinite H; where H is singular, which is normal, by its pseudo-inverse."""
    factor = _cholesky(h)
    if factor is not None:
        return torch.cholesky_solve(right, factor)
    root = _inverse_root(h)
    return root.mT @ (root @ right)


def whiten(h: Float[Tensor, "d d"], right: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """Multiply by a root R of the inverse, R^T R = H^-1 (pseudo-inverse where H is singular).

    Then whiten(h, x)^T whiten(h, y) = x^T H^-1 y.
    """
    factor = _cholesky(h)
    if factor is not None:
        return torch.linalg.solve_triangular(factor, right, upper=False)
    return _inverse_root(h) @ right


def _cholesky(h: Float[Tensor, "d d"]) -> Float[Tensor, "d d"] | None:
    """The factor of H, or None where H is singular to working precision."""
    factor, failed = torch.linalg.cholesky_ex(h)
    diagonal = factor.diagonal()
    return None if failed or diagonal.min() < 1e-7 * diagonal.max() else factor


def _inverse_root(h: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    values, vectors = torch.linalg.eigh(h)
    keep = values > values[-1] * len(values) * torch.finfo(h.dtype).eps
    return torch.where(keep, values, torch.inf).rsqrt()[:, None] * vectors.mT
