"""Missing connections: the exact zeros of pruned networks stay zeros (Sec. 3.6).

Nothing marks a network as pruned: in a pruned layer a weight that is exactly 0 is a connection that does not exist.
Biases always do. Which layers are pruned is told from their weights (`pruned_layers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from taskzip.algebra.curvature import solve_symmetric
from taskzip.algebra.factored import Factored, Span

Connections = Literal["denser", "any"]
"""Which connections a unit has that others were merged into."""


FEW = 0.05
"""A smaller part of the weights that is exactly 0 was not pruned away: of weights that were once stored in 8 bits, 1 to
2% are 0; pruning removes a third of the weights and more, or it does not pay."""

_SAME = 1e-3  # relative difference below which two weights are the same step of a grid


def pruned_layers(weights: Mapping[str, Tensor]) -> set[str]:
    """The layers in which a weight that is exactly 0 is a missing connection.

    They have zeros, and these are not a few: more than 5% of the layer or of all such layers together, so that all
    zeros of a pruned network count. Nor are they what is left where weights were rounded to a grid of few steps.

    Args:
        weights: per layer, its weight [units, ...] as the network came.
    """
    zeros = {name: int((w == 0).sum()) for name, w in weights.items()}
    cut = [name for name, w in weights.items() if zeros[name] and not _on_a_grid(w)]
    whole = {name for name in cut if zeros[name] == weights[name].numel()}  # these may have been made so
    total = sum(weights[name].numel() for name in cut if name not in whole)
    all_many = _many(sum(zeros[name] for name in cut if name not in whole), total)
    return {name for name in cut if name in whole or all_many or _many(zeros[name], weights[name].numel())}


def _many(zeros: int, total: int) -> bool:
    """Whether more are 0 than a few, and than chance makes of a few where there are not many weights."""
    return zeros >= FEW * total + 3 * (FEW * total) ** 0.5


def _on_a_grid(weight: Tensor) -> bool:
    """Whether zeros are one step of many: the step next to 0, common to all rows or each row's own, is as usual.

    Where weights are cut off, few or none of those that stay are of the smallest size; on a grid about twice as many as
    are 0.
    """
    sizes = weight.detach().abs().flatten(1)
    zeros = int((sizes == 0).sum())
    sizes = torch.where(sizes == 0, torch.inf, sizes)
    for rows in (sizes.reshape(1, -1), sizes):
        least = rows.amin(1, keepdim=True)
        same = ((rows <= least * (1 + _SAME)) & rows.isfinite()).sum(1)
        if 2 * int((same - 1).clamp_min(0).sum()) >= zeros:
            return True
    return False


def support(weights: Float[Tensor, "units d"], *, bias: bool) -> Bool[Tensor, "units d"] | None:
    """Which connections of a pruned layer exist; None where all do. With `bias`, the last column does in any case."""
    exists = weights != 0
    if bias:
        exists[:, -1] = True
    return None if exists.all() else exists


def denser(supports: Sequence[Bool[Tensor, "units d"] | None]) -> Bool[Tensor, "units d"] | None:
    """Of units that become one, the support with more connections; None where that is all of them."""
    if any(each is None for each in supports):
        return None
    first, *others = (each for each in supports if each is not None)
    for other in others:
        first = torch.where((other.sum(1) > first.sum(1))[:, None], other, first)
    return None if first.all() else first


def united(supports: Sequence[Bool[Tensor, "units d"] | None]) -> Bool[Tensor, "units d"] | None:
    """All connections that any of the units has that become one; None where that is all there are."""
    if any(each is None for each in supports):
        return None
    found = torch.stack([each for each in supports if each is not None]).any(0)
    return None if found.all() else found


def solve_on_support(
    h: Float[Tensor, "d d"], right: Float[Tensor, "d k"], exists: Bool[Tensor, "k d"] | None
) -> Float[Tensor, "d k"]:
    """H^-1 right, column by column over the connections that exist, 0 elsewhere.

    Column k minimises 1/2 w^T H w - w^T right among all w with that support.
    """
    if exists is None:
        return solve_symmetric(h, right)
    solved = torch.zeros_like(right)
    whole = exists.all(1)
    if whole.any():
        solved[:, whole] = solve_symmetric(h, right[:, whole])
    for k in (~whole).nonzero().flatten().tolist():
        places = exists[k].nonzero().flatten()
        if len(places):
            solved[places, k] = solve_symmetric(h[places[:, None], places], right[places, k, None])[:, 0]
    return solved


def fit(h: Factored, answers: Float[Tensor, "n units"], prior: Float[Tensor, "units d"]) -> Float[Tensor, "units d"]:
    """The weights of least |U w - answers|^2 + (w - prior)^T D (w - prior), for H = U^T U + diag(D).

    What the rows do not tell stays as it is in `prior`.
    """
    span = Span([h])
    inside = span.inside(prior)
    right = span.inside(h.rows).mT @ answers + span.inside_diagonal(h.diagonal)[:, None] * inside.mT
    return span.with_inside(prior, solve_symmetric(span.curvatures[0], right).mT)


def fit_on_support(
    h: Factored, answers: Float[Tensor, "n units"], prior: Float[Tensor, "units d"], exists: Bool[Tensor, "units d"]
) -> Float[Tensor, "units d"]:
    """The same, unit by unit over the connections that exist, 0 elsewhere."""
    found = torch.zeros_like(prior)
    for k in range(len(prior)):
        places = exists[k].nonzero().flatten()
        if len(places):
            found[k, places] = fit(h.restricted(places), answers[:, k, None], prior[None, k, places])[0]
    return found
