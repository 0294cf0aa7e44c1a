"""Curvature of a layer's error: H = 1/n sum x x^T over what its units read (eq. 7 and 8), as a running sum.

The last input is fixed to 1, so that the bias is one more incoming weight. The same pass also keeps what the original
network answered at those inputs, because least squares (`recalibration`) and the curvature need the same rows.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class LayerStatistics:
    """Sums over the rows that one layer of one task read, and over what its units should answer there.

    The answers are summed up less a constant near their mean, because a unit's spread may be far below its mean.

    Attributes:
        gram: sum x x^T, [d + 1, d + 1], the last input being the constant 1.
    """

    def __init__(self, inputs: int, units: int, device: torch.device) -> None:
        self.gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self._cross = torch.zeros(inputs + 1, units, dtype=torch.float64, device=device)
        self._square = torch.zeros(units, dtype=torch.float64, device=device)
        self._origin: Tensor | None = None

    def update(self, rows: Float[Tensor, "rows d"], answers: Float[Tensor, "rows units"], weight: float = 1.0) -> None:
        """Add rows; `weight` says how many rows each of them stands for (sampling leaves the sums unbiased)."""
        if self._origin is None:
            self._origin = answers.mean(0)
        x = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)
        z = answers - self._origin
        self.gram += weight * (x.mT @ x)
        self._cross += weight * (x.mT @ z)
        self._square += weight * z.square().sum(0)

    def is_finite(self) -> bool:
        """Whether no NaN or infinity was read."""
        return bool(torch.isfinite(self.gram.diagonal()).all() and torch.isfinite(self._square).all())

    @property
    def rows(self) -> float:
        """How many rows (samples times output positions) the sums stand for."""
        return float(self.gram[-1, -1])

    @property
    def cross(self) -> Float[Tensor, "d1 units"]:
        """sum x z^T, z being the pre-activations of the original network."""
        return self._cross if self._origin is None else self._cross + torch.outer(self.gram[-1], self._origin.double())

    @property
    def square(self) -> Float[Tensor, " units"]:
        """sum z^2."""
        if self._origin is None:
            return self._square
        origin = self._origin.double()
        return self._square + 2 * origin * self._cross[-1] + self.rows * origin.square()

    def answer_moments(self) -> tuple[Float[Tensor, " units"], Float[Tensor, " units"]]:
        """Mean and variance of the original network's pre-activations, per unit."""
        mean = self._cross[-1] / self.rows
        variance = (self._square / self.rows - mean.square()).clamp_min(0)
        return mean if self._origin is None else mean + self._origin, variance

    def moments(self, weights: Float[Tensor, "units d1"]) -> tuple[Float[Tensor, " units"], Float[Tensor, " units"]]:
        """Mean and variance of what units with these incoming weights (bias last) answer on the same rows."""
        mean = self.gram[-1] / self.rows
        free = weights[:, :-1]
        variance = (free @ self.covariance()[:-1, :-1] * free).sum(1)
        return weights @ mean, variance.clamp_min(0)

    def covariance(self) -> Float[Tensor, "d1 d1"]:
        """Covariance of the inputs over the rows; the constant input has none."""
        mean = self.gram[-1] / self.rows
        return self.gram / self.rows - torch.outer(mean, mean)


def damped(h: Float[Tensor, "d d"], damping: float) -> Float[Tensor, "d d"]:
    """H + damping * mean(diag(H)) * I: where the data say nothing, each task's own weights are the prior."""
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
