"""Functional difference: by how much the layer errors of two tasks rise when two units are merged optimally.

Eq. 12 of the paper, d = 1/2 (wA - wB)^T (HA^-1 + HB^-1)^-1 (wA - wB), for all pairs of units at once and without the
inverse of a curvature, which is often singular: M = (HA^-1 + HB^-1)^-1 is HA S^-1 HB with S = HA + HB, the parallel
sum, and HA S^-1 HB = HA - HA S^-1 HA = HB - HB S^-1 HB, so that only H w, one factor of S and one product of pairs are
needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from taskzip.algebra.curvature import whiten
from taskzip.algebra.factored import Factored, Span, dense, span_of

_CHUNK = 2048  # columns of which weighted copies are made at a time


class _Products(NamedTuple):
    """What the difference of a pair is put together from."""

    own_a: Float[Tensor, " a"]  # wA^T M wA
    own_b: Float[Tensor, " b"]
    both: Float[Tensor, "a b"]  # wA^T M wB
    size_a: Float[Tensor, " a"]  # wA^T HA wA
    size_b: Float[Tensor, " b"]


def functional_difference(
    w_a: Float[Tensor, "a d"],
    w_b: Float[Tensor, "b d"],
    h_a: Float[Tensor, "d d"] | Factored,
    h_b: Float[Tensor, "d d"] | Factored,
    *,
    rows: int = 1,
) -> Float[Tensor, "units_a units_b"]:
    """d (eq. 12) between every unit of A and every unit of B.

    Args:
        w_a: incoming weights of A, one row after another, over the d inputs that both tasks share (the bias is one).
        w_b: those of B.
        h_a: the curvature of A over those inputs, weighted by the balance and damped.
        h_b: that of B.
        rows: how many rows one unit has (those of an attention head); its d is the sum over them, row by row.

    Returns:
        The rise in the balanced layer error, [units of A, units of B]; never negative.
    """
    w_a, w_b = w_a.unflatten(0, (-1, rows)), w_b.unflatten(0, (-1, rows))
    span = span_of([h_a, h_b])
    p = _products_by_span(w_a, w_b, span) if span else _products(w_a, w_b, dense(h_a), dense(h_b))
    d = (p.own_a[:, None] + p.own_b[None, :]).sub_(p.both, alpha=2).mul_(0.5)
    # Equal weights leave only rounding, in proportion to what was subtracted: that is 0.
    return d.masked_fill_(d <= 1e-13 * torch.minimum(p.size_a[:, None], p.size_b[None, :]), 0)


def _products(
    w_a: Float[Tensor, "a rows d"], w_b: Float[Tensor, "b rows d"], h_a: Float[Tensor, "d d"], h_b: Float[Tensor, "d d"]
) -> _Products:
    total = h_a + h_b
    pulled_a, pulled_b = (h @ w.flatten(0, 1).mT for w, h in ((w_a, h_a), (w_b, h_b)))  # [d, units * rows]
    white_a, white_b = (_by_unit(whiten(total, p), w) for w, p in ((w_a, pulled_a), (w_b, pulled_b)))
    size_a, size_b = ((w.flatten(1) * _by_unit(p, w)).sum(1) for w, p in ((w_a, pulled_a), (w_b, pulled_b)))
    own_a, own_b = size_a - white_a.square().sum(1), size_b - white_b.square().sum(1)
    return _Products(own_a, own_b, white_a @ white_b.mT, size_a, size_b)


def _by_unit(columns: Float[Tensor, "r rows_of_all"], w: Float[Tensor, "a rows d"]) -> Float[Tensor, "a rows_by_r"]:
    """Columns that belong to the rows of units, as one long row for each unit."""
    return columns.mT.reshape(w.shape[0], w.shape[1] * columns.shape[0])


def _products_by_span(w_a: Float[Tensor, "a rows d"], w_b: Float[Tensor, "b rows d"], span: Span) -> _Products:
    """From small matrices in the span of the rows; outside it both curvatures are diagonal."""
    in_a, in_b = (span.inside(w.flatten(0, 1)).unflatten(0, w.shape[:2]) for w in (w_a, w_b))
    inside = _products(in_a, in_b, *span.curvatures)
    everywhere = _diagonal_products(w_a, w_b, *span.diagonals)
    taken_twice = _diagonal_products(in_a, in_b, *map(span.inside_diagonal, span.diagonals))
    return _Products(*(x + y - z for x, y, z in zip(inside, everywhere, taken_twice, strict=True)))


def _diagonal_products(
    w_a: Float[Tensor, "a rows d"], w_b: Float[Tensor, "b rows d"], h_a: Float[Tensor, " d"], h_b: Float[Tensor, " d"]
) -> _Products:
    """The products where HA and HB are diagonal matrices."""
    total = h_a + h_b
    metric = torch.where(total > 0, h_a * h_b / total, 0)
    p = _Products(*(w_a.new_zeros(n) for n in (len(w_a), len(w_b), (len(w_a), len(w_b)), len(w_a), len(w_b))))
    for a, b, m, x, y in zip(*(each.split(_CHUNK, dim=-1) for each in (w_a, w_b, metric, h_a, h_b)), strict=True):
        square_a, square_b = a.square().sum(1), b.square().sum(1)
        p.own_a.addmv_(square_a, m)
        p.own_b.addmv_(square_b, m)
        p.both.addmm_((m * a).flatten(1), b.flatten(1).mT)
        p.size_a.addmv_(square_a, x)
        p.size_b.addmv_(square_b, y)
    return p
