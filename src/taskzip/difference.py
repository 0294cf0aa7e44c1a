"""Functional difference: by how much the layer errors of two tasks rise when two units are merged optimally.

Eq. 12 of the paper, d = 1/2 (wA - wB)^T (HA^-1 + HB^-1)^-1 (wA - wB), for all pairs of units at once and without the
inverse of a curvature, which is often singular: (HA^-1 + HB^-1)^-1 = HA (HA + HB)^-1 HB, the parallel sum.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from taskzip.curvature import solve_symmetric


def parallel_sum(h_a: Float[Tensor, "d d"], h_b: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """HA (HA + HB)^-1 HB: symmetric, positive semidefinite, defined for singular curvatures too."""
    product = h_a @ solve_symmetric(h_a + h_b, h_b)
    return (product + product.mT) / 2


def functional_difference(
    w_a: Float[Tensor, "a d"],
    w_b: Float[Tensor, "b d"],
    h_a: Float[Tensor, "d d"],
    h_b: Float[Tensor, "d d"],
) -> Float[Tensor, "a b"]:
    """d (eq. 12) between every unit of A and every unit of B.

    Args:
        w_a, w_b: incoming weights, one unit a row, over the d inputs that both tasks share (the bias is one of them).
        h_a, h_b: the tasks' curvatures over those inputs, weighted by the balance and damped.

    Returns:
        The rise in the balanced layer error, [units of A, units of B]; never negative.
    """
    metric = parallel_sum(h_a, h_b)
    towards = w_a @ metric
    squared = (towards * w_a).sum(1)[:, None] + ((w_b @ metric) * w_b).sum(1)[None, :] - 2 * towards @ w_b.mT
    return squared.clamp_min_(0).mul_(0.5)
