"""Ranks for the layers of one network: what the next parameter buys at the output, over all layers at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Point = tuple[int | None, int, float]
"""Rank, None for the layer as it is; parameters; error."""


@dataclass(frozen=True)
class Ranked:
    """A layer that can be of lower rank.

    Attributes:
        errors: of rank 0, 1, ...: what is left of the error at the output, never rising; 0 where the layer is whole.
        each: parameters that one rank takes.
        whole: parameters of the layer as it is.
    """

    errors: np.ndarray
    each: int
    whole: int

    @property
    def most(self) -> int:
        """The largest rank that is smaller than the layer as it is."""
        return min(len(self.errors) - 1, (self.whole - 1) // self.each)

    @property
    def least(self) -> int:
        """The fewest parameters that it can have."""
        return self.each if self.most else self.whole


def choose_ranks(layers: Sequence[Ranked], parameters: int) -> list[int | None]:
    """The rank of each layer, or None where it stays whole, that fit into so many parameters, least errors first.

    From rank 1 on, steps along the lower convex hull of each layer's (parameters, error), those that take away most for
    a parameter first; what is left then goes to single ranks that still fit.
    """
    hulls = [_hull(layer) for layer in layers]
    steps = sorted(
        (_slope(a, b), k, i) for k, hull in enumerate(hulls) for i, (a, b) in enumerate(itertools.pairwise(hull))
    )
    at = [0 for _ in layers]
    left = parameters - sum(hull[0][1] for hull in hulls)
    for _, k, i in steps:
        size = hulls[k][i + 1][1] - hulls[k][i][1]
        if at[k] == i and size <= left:
            at[k], left = i + 1, left - size
    ranks = [hull[i][0] for hull, i in zip(hulls, at, strict=True)]
    return _filled(layers, ranks, left)


def _points(layer: Ranked) -> list[_Point]:
    """What the layer can be, smallest first; the layer as it is at the end."""
    ranks: list[_Point] = [(r, r * layer.each, float(layer.errors[r])) for r in range(1, layer.most + 1)]
    return [*ranks, (None, layer.whole, 0.0)]


def _hull(layer: Ranked) -> list[_Point]:
    """The points below which no mean of two others lies."""
    hull: list[_Point] = []
    for point in _points(layer):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: _Point, b: _Point) -> float:
    return (b[2] - a[2]) / (b[1] - a[1])


def _filled(layers: Sequence[Ranked], ranks: list[int | None], left: int) -> list[int | None]:
    """Single ranks more, those that take away most first, as long as one fits."""
    while True:
        gains = [
            ((layer.errors[rank] - layer.errors[rank + 1]) / layer.each, k)
            for k, (layer, rank) in enumerate(zip(layers, ranks, strict=True))
            if rank is not None and rank < layer.most and layer.each <= left
        ]
        if not gains:
            return ranks
        k = max(gains)[1]
        ranks[k] = (ranks[k] or 0) + 1
        left -= layers[k].each
