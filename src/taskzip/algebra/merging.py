"""The weight update: one set of incoming weights for units that several tasks share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from taskzip.algebra.factored import Factored, Span, dense
from taskzip.algebra.sparsity import fit_on_support, solve_on_support

_H = TypeVar("_H", Tensor, Factored)

_LEAST = -10
"""The error of a row counts at least 2^-10 of what counts most of its pair."""


def merge_weights(
    weights: Sequence[Float[Tensor, "units d"]],
    curvatures: Sequence[Float[Tensor, "d d"] | Factored],
    exists: Bool[Tensor, "units d"] | None = None,
    importance: Sequence[Float[Tensor, " units"]] | None = None,
) -> Float[Tensor, "units d"]:
    """The weights that raise the tasks' summed layer error least: w = (sum H_t)^-1 (sum H_t w_t).

    For two tasks this is eq. 10 and 11 of the paper, written without an inverse of a single curvature. Where all
    rows count alike it is associative: merging in several steps, with the curvatures added up, gives the same as all at
    once.

    Args:
        weights: per task, the incoming weights of the paired units, row p of every task belonging to one pair.
        curvatures: per task, H over the same d inputs, weighted by the balance and damped.
        exists: the connections that the merged units have, where not all; the others are 0 (Sec. 3.6), and the error
            is the least that is possible without them.
        importance: per task, by which factor its error of each row counts; None where all count alike. Pairs whose
            ratios round to the same powers of two are solved together, at most 3% from the least error. None counts
            less than 2^-10 of the highest.
    """
    few = [h for h in curvatures if isinstance(h, Factored)]
    span = Span(few) if len(few) == len(curvatures) else None
    whole = [] if span else [dense(h) for h in curvatures]
    merged = torch.empty_like(weights[0])
    for rows, counts in _alike(importance, len(curvatures)):
        some, there = [w[rows] for w in weights], None if exists is None else exists[rows]
        merged[rows] = (
            _merged_in_span(some, _times(counts, few), span.times(counts), there)
            if span
            else _merged(some, _times(counts, whole), there)
        )
    return merged


def _alike(
    importance: Sequence[Float[Tensor, " units"]] | None, tasks: int
) -> Iterator[tuple[Int[Tensor, " some"] | slice, list[float]]]:
    """Rows for which the tasks count alike, and how much each does: powers of two, 1 for the highest."""
    if importance is None:
        yield slice(None), [1.0] * tasks
        return
    powers = torch.stack(list(importance), 1).log2()
    powers = (powers - powers.amax(1, keepdim=True)).round().clamp_min(_LEAST)
    kinds, kind = torch.unique(powers, dim=0, return_inverse=True)
    for k, each in enumerate(kinds.exp2().tolist()):
        yield (kind == k).nonzero().flatten(), each


def _times(counts: Sequence[float], curvatures: Sequence[_H]) -> list[_H]:
    return [h if c == 1 else c * h for c, h in zip(counts, curvatures, strict=True)]


def _merged_in_span(
    weights: Sequence[Float[Tensor, "units d"]],
    curvatures: Sequence[Factored],
    span: Span,
    exists: Bool[Tensor, "units d"] | None,
) -> Float[Tensor, "units d"]:
    means = _column_means(weights, span.diagonals)
    merged = span.with_inside(means, _merged([span.inside(w) for w in weights], span.curvatures))
    if exists is not None:
        pruned = (~exists.all(1)).nonzero().flatten()
        total = Factored(torch.cat([h.rows for h in curvatures]), torch.stack(span.diagonals).sum(0))
        answers = torch.cat([h.rows @ w[pruned].mT for h, w in zip(curvatures, weights, strict=True)])
        merged[pruned] = fit_on_support(total, answers, means[pruned], exists[pruned])
    return merged


def _merged(
    weights: Sequence[Float[Tensor, "units d"]],
    curvatures: Sequence[Float[Tensor, "d d"]],
    exists: Bool[Tensor, "units d"] | None = None,
) -> Float[Tensor, "units d"]:
    first = weights[0] if exists is None else weights[0] * exists
    total = sum(curvatures[1:], start=curvatures[0])
    # w - w_1 = (sum H_t)^-1 sum H_t (w_t - w_1): one product less, and equal weights stay exactly what they are.
    pull = torch.zeros_like(first.mT)
    for h, w in zip(curvatures, weights, strict=True):
        if w is not first:
            pull += h @ (w - first).mT
    return first + solve_on_support(total, pull, exists).mT


def _column_means(
    weights: Sequence[Float[Tensor, "units d"]], diagonals: Sequence[Float[Tensor, " d"]]
) -> Float[Tensor, "units d"]:
    """The same for diagonal curvatures; where all are 0, the first task's weights."""
    mean, total = weights[0].clone(), diagonals[0]
    for h, w in zip(diagonals[1:], weights[1:], strict=True):
        total = total + h
        mean.lerp_(w, torch.where(total > 0, h / total, 0))
    return mean
