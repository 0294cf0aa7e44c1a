"""Weights of low rank in the metric of what a layer reads, and of what its answers matter to the network's output.

With answers z = W x of covariance Z = W C W^T and a metric G of their errors (`observing.sensitivity`), the weights of
rank r that minimise tr(G E[dz dz^T]) are a projection of the answers: W_r = G^-1/2 P P^T G^1/2 W, with P the first r
eigenvectors of G^1/2 Z G^1/2, whose other eigenvalues are the error (Eckart and Young; reduced-rank regression). So no
inverse of the inputs' curvature is needed, which is often singular.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from taskzip.algebra.curvature import LayerStatistics
from taskzip.algebra.factored import Factored, restricted

_LEAST = 1e-4
"""No direction of the answers matters less than so much of the mean."""


class LowRank(NamedTuple):
    """W = left @ right, and the bias that keeps the mean of what units answer."""

    left: Float[Tensor, "units rank"]
    right: Float[Tensor, "rank d"]
    bias: Float[Tensor, " units"]

    def weights(self) -> Float[Tensor, "units d1"]:
        """All incoming weights, bias last."""
        return torch.cat([self.left @ self.right, self.bias[:, None]], dim=1)


def spectrum(
    statistics: LayerStatistics, weights: Float[Tensor, "units d1"], metric: Float[Tensor, "units units"], *, bias: bool
) -> Float[Tensor, " units"]:
    """The part of the error that each further rank takes away, largest first; all together, that of answering nothing.

    Args:
        statistics: the sums over what the layer reads.
        weights: its weights, bias last.
        metric: how much errors of its answers matter.
        bias: whether it has a bias, which keeps the means of its answers whatever the rank.
    """
    root = _root(metric)
    return torch.linalg.eigvalsh(root @ _answers(statistics, weights, bias) @ root).flip(0).clamp_min(0)


def low_rank(
    statistics: LayerStatistics,
    weights: Float[Tensor, "units d1"],
    metric: Float[Tensor, "units units"],
    rank: int,
    *,
    bias: bool,
) -> LowRank:
    """The weights of this rank with the least error, see `spectrum`."""
    root = _root(metric)
    _, vectors = torch.linalg.eigh(root @ _answers(statistics, weights, bias) @ root)
    first = vectors[:, -rank:]
    right = first.mT @ root @ weights[:, :-1]
    left = torch.linalg.solve(root, first)
    sizes = [torch.linalg.vector_norm(each, dim=dim) for each, dim in ((left, 0), (right, 1))]
    balance = torch.where((sizes[0] > 0) & (sizes[1] > 0), (sizes[1] / sizes[0]).sqrt(), 1)
    left, right = left * balance, right / balance[:, None]
    shift = weights[:, -1]
    if bias:
        shift = shift + (weights[:, :-1] - left @ right) @ statistics.input_mean()[:-1]
    return LowRank(left, right, shift)


def _answers(
    statistics: LayerStatistics, weights: Float[Tensor, "units d1"], bias: bool
) -> Float[Tensor, "units units"]:
    """Covariance of what the units answer; their mean squares where no bias keeps the means."""
    h = statistics.covariance() if bias else (1 / statistics.rows) * statistics.curvature
    h, w = restricted(h, slice(0, -1)), weights[:, :-1]
    if isinstance(h, Factored):
        pulled = w @ h.rows.mT
        return pulled @ pulled.mT + (w * h.diagonal) @ w.mT
    return w @ h @ w.mT


def _root(metric: Float[Tensor, "units units"]) -> Float[Tensor, "units units"]:
    """The symmetric root of a metric in which every direction matters at least a little; of nothing that of 1."""
    if not metric.any():
        return torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    values, vectors = torch.linalg.eigh(metric)
    least = _LEAST * values.clamp_min(0).mean()
    return (vectors * values.clamp_min(float(least)).sqrt()) @ vectors.mT
