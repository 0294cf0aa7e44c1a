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

    Attributes:
        gram: sum x x^T, [d + 1, d + 1], the last input being the constant 1.
        cross: sum x z^T, [d + 1, units], z being the pre-activations of the original network.
        square: sum z^2, [units].
    """

    def __init__(self, inputs: int, units: int, device: torch.device) -> None:
        self.gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs + 1, units, dtype=torch.float64, device=device)
        self.square = torch.zeros(units, dtype=torch.float64, device=device)

    def update(self, rows: Float[Tensor, "rows d"], answers: Float[Tensor, "rows units"], weight: float = 1.0) -> None:
        """Add rows; `weight` says how many rows each of them stands for (sampling leaves the sums unbiased)."""
        x = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)
        self.gram += weight * (x.mT @ x)
        self.cross += weight * (x.mT @ answers)
        self.square += weight * answers.square().sum(0, dtype=torch.float64)

    def is_finite(self) -> bool:
        """Whether no NaN or infinity was read."""
        return bool(torch.isfinite(self.gram.diagonal()).all() and torch.isfinite(self.square).all())

    @property
    def rows(self) -> float:
        """How many rows (samples times output positions) the sums stand for."""
        return float(self.gram[-1, -1])

    def answer_moments(self) -> tuple[Float[Tensor, " units"], Float[Tensor, " units"]]:
        """Mean and variance of the original network's pre-activations, per unit."""
        mean = self.cross[-1] / self.rows
        return mean, (self.square / self.rows - mean.square()).clamp_min(0)

    def moments(self, weights: Float[Tensor, "units d1"]) -> tuple[Float[Tensor, " units"], Float[Tensor, " units"]]:
        """Mean and variance of what units with these incoming weights (bias last) answer on the same rows."""
        mean = weights @ self.gram[-1] / self.rows
        return mean, ((weights @ self.gram * weights).sum(1) / self.rows - mean.square()).clamp_min(0)


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
    """R right with R^T R = H^-1 (the pseudo-inverse where H is singular), so that whiten(x)^T whiten(y) = x^T H^-1 y."""
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
