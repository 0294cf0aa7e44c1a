"""The layer-wise optimal brain surgeon: what it costs to remove a weight if those that stay make up for it.

Around its present weights a layer's error is 1/2 dw^T H dw for every unit, with H = sum x x^T. Removing weight q and
moving the others of the unit's support S by the best dw costs L_q = w_q^2 / (2 [H_SS^-1]_qq): Sec. 3 of X. Dong,
S. Chen, S. J. Pan, Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain Surgeon, NeurIPS 2017
(arXiv:1705.07565). The paper ranks all weights once. Where inputs are correlated, a weight becomes dear when those that
could stand in for it are gone, so that here the cheapest go in rounds, and the rest is solved again after each.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from taskzip.algebra.factored import Factored, Span

ROUND = 0.5
"""The part of the weights that a round leaves."""

_WORK = 1e12
"""Multiplications that one round may take: larger supports are cut at once to what can be solved unit by unit."""

_CHUNK_ELEMENTS = 2**25  # values of the units' own curvatures that are held at once


def removal_costs(
    h: Float[Tensor, "d d"] | Factored, weights: Float[Tensor, "units d"], kept: int, *, free: int
) -> Float[Tensor, "units free"]:
    """What each weight cost when it was removed, in rounds, until only `kept` are left.

    Costs rise from one round to the next, so that the dearest k, for any k >= kept, are those to keep.

    Args:
        h: the curvature H, positive definite (damped).
        weights: the weights at which the error is least over those that are not 0; a unit per row.
        kept: how many weights to go down to, of those in the first columns.
        free: how many columns these are; the others (a bias) are never removed.

    Returns:
        The costs, in units of the layer's error; -inf for weights that were 0 from the start, and L_q of the last round
        for those that were never removed.
    """
    exists = weights != 0
    exists[:, free:] = True
    costs = weights.new_full((len(weights), free), -torch.inf)
    affordable = round((_WORK / len(weights)) ** (1 / 3)) * len(weights)
    now, right, lowest = _first_costs(h, weights, exists, affordable), _times(h, weights), 0.0
    while True:
        places = exists[:, :free].nonzero(as_tuple=True)
        found = now[places].clamp_min(lowest)
        costs[places] = found
        left = max(kept, min(int(ROUND * len(found)), affordable))
        if left >= len(found):
            return costs
        gone = found.argsort()[: len(found) - left]
        lowest = math.nextafter(float(found[gone[-1]]), math.inf)
        exists[places[0][gone], places[1][gone]] = False
        now = _costs(h, right, exists)


def _first_costs(
    h: Float[Tensor, "d d"] | Factored, weights: Float[Tensor, "units d"], exists: Bool[Tensor, "units d"], most: int
) -> Float[Tensor, "units d"]:
    """L_q at the present weights, from one inverse for all units where they have all connections (or too many)."""
    if not exists.all() and int(exists.sum()) <= most:
        return _costs(h, _times(h, weights), exists)
    return weights.square() / (2 * _inverse_diagonal(h))


def _inverse_diagonal(h: Float[Tensor, "d d"] | Factored) -> Float[Tensor, " d"]:
    if isinstance(h, Tensor):
        return torch.cholesky_inverse(torch.linalg.cholesky(h)).diagonal()
    span = Span([h])
    root = torch.linalg.inv(torch.linalg.cholesky(span.curvatures[0]))
    eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
    basis = span.with_inside(root.new_zeros(len(root), len(h)), eye)
    return (1 - basis.square().sum(0)) / h.diagonal + (root @ basis).square().sum(0)


def _costs(
    h: Float[Tensor, "d d"] | Factored, right: Float[Tensor, "units d"], exists: Bool[Tensor, "units d"]
) -> Float[Tensor, "units d"]:
    """L_q of every unit at the weights that are best over its support, 0 elsewhere."""
    costs = torch.zeros_like(right)
    sizes, order = exists.sum(1).sort(descending=True)
    first = 0
    while first < len(order):
        # Units of similar supports go together: each is padded to the largest of them.
        size = max(1, int(sizes[first]))
        units = order[first : first + max(1, _CHUNK_ELEMENTS // size**2)]
        first += len(units)
        there, columns = exists[units].byte().topk(size, dim=1)
        part = _on_supports(h, columns, there)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(part))
        best = (inverse @ (right[units].gather(1, columns) * there)[:, :, None])[:, :, 0]
        found = best.square() / (2 * inverse.diagonal(dim1=1, dim2=2))
        costs[units] = costs[units].scatter(1, columns, found * there)
    return costs


def _on_supports(
    h: Float[Tensor, "d d"] | Factored, columns: Int[Tensor, "units s"], there: UInt8[Tensor, "units s"]
) -> Float[Tensor, "units s s"]:
    """H over each unit's columns, the unit matrix where a column is only padding."""
    if isinstance(h, Factored):
        rows = h.rows.mT[columns] * there[:, :, None]
        part, diagonal = rows @ rows.mT, h.diagonal[columns] * there
    else:
        part, diagonal = h[columns[:, :, None], columns[:, None, :]], torch.zeros_like(there)
        part *= there[:, :, None] * there[:, None, :]
    part.diagonal(dim1=1, dim2=2).add_(diagonal + 1 - there)
    return part


def _times(h: Float[Tensor, "d d"] | Factored, weights: Float[Tensor, "units d"]) -> Float[Tensor, "units d"]:
    if isinstance(h, Factored):
        return weights @ h.rows.mT @ h.rows + weights * h.diagonal
    return weights @ h
