"""Functional difference: by how much the layer errors of two tasks rise when two units are merged optimally.

Eq. 12 of the paper, d = 1/2 (wA - wB)^T (HA^-1 + HB^-1)^-1 (wA - wB), for all pairs of units at once and without the
inverse of a curvature, which is often singular: M = (HA^-1 + HB^-1)^-1 is HA S^-1 HB with S = HA + HB, the parallel
sum, and HA S^-1 HB = HA - HA S^-1 HA = HB - HB S^-1 HB, so that only H w, one factor of S and one product of pairs are
needed.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from taskzip.curvature import whiten


def functional_difference(
    w_a: Float[Tensor, "a d"],
    w_b: Float[Tensor, "b d"],
    h_a: Float[Tensor, "d d"],
    h_b: Float[Tensor, "d d"],
    *,
    rows: int = 1,
) -> Float[Tensor, "units_a units_b"]:
    """d (eq. 12) between every unit of A and every unit of B.

    Args:
        w_a: incoming weights of A, one unit a row, over the d inputs that both tasks share (the bias is one of them).
        w_b: those of B.
        h_a: the curvature of A over those inputs, weighted by the balance and damped.
        h_b: that of B.
        rows: how many rows one unit has (those of an attention head); its d is the sum over them, row by row.

    Returns:
        The rise in the balanced layer error, [units of A, units of B]; never negative.
    """
    total = h_a + h_b
    pulled_a, pulled_b = h_a @ w_a.mT, h_b @ w_b.mT  # [d, units]
    white_a, white_b = whiten(total, pulled_a), whiten(total, pulled_b)
    size_a, size_b = ((w * p.mT).unflatten(0, (-1, rows)).sum((1, 2)) for w, p in ((w_a, pulled_a), (w_b, pulled_b)))
    white_a, white_b = (white.mT.reshape(-1, rows * white.shape[0]) for white in (white_a, white_b))
    own_a, own_b = size_a - white_a.square().sum(1), size_b - white_b.square().sum(1)  # wA^T M wA, wB^T M wB
    d = (own_a[:, None] + own_b[None, :]).sub_(white_a @ white_b.mT, alpha=2).mul_(0.5)
    # Equal weights leave only rounding, in proportion to what was subtracted: that is 0.
    return d.masked_fill_(d <= 1e-13 * torch.minimum(size_a[:, None], size_b[None, :]), 0)
