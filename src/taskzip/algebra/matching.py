"""Which unit of task A is paired with which unit of task B: greedy (the paper's), optimal, or random.

All functions take the matrix of functional differences d (eq. 12) and return index pairs; they know nothing of models.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Matching = Literal["optimal", "greedy", "random"]


class Pairs(NamedTuple):
    """Unit `a[p]` of task A is paired with unit `b[p]` of task B at cost `cost[p]`; sorted by `a`."""

    a: Int[Tensor, " pairs"]
    b: Int[Tensor, " pairs"]
    cost: Float[Tensor, " pairs"]


def match(
    difference: Float[Tensor, "a b"],
    *,
    count: int | None = None,
    threshold: float | None = None,
    method: Matching = "optimal",
    seed: int = 0,
) -> Pairs:
    """Choose pairs of units, each unit in at most one pair.

    Args:
        difference: d for all pairs (eq. 12), shape [units of A, units of B], no NaN.
        count: how many pairs; at most min(units of A, units of B), which is also the default.
        threshold: pair only where d <= threshold (the paper's epsilon_l, which d must be below); may be combined with
            `count`.
        method: "optimal" minimises the sum of d over exactly `count` pairs (with a threshold alone: the sum of
            d - threshold over however many pairs that takes); "greedy" takes the smallest remaining d, pair by pair
            (Algorithm 1); "random" draws pairs without looking at d.
        seed: for "random".

    Raises:
        ValueError: a count outside 0..min(units), an unknown method, or NaN in `difference`.
    """
    d = difference.detach().double().cpu().numpy()
    most = min(d.shape)
    count = most if count is None else count
    if not 0 <= count <= most:
        raise ValueError(
            f"cannot choose {count} pairs among {d.shape[0]} and {d.shape[1]} units: 0 to {most} is possible"
        )
    if np.isnan(d).any():
        raise ValueError("the functional difference has NaN entries: check the weights and the calibration data")
    a, b = match_costs(d, count, method=method, seed=seed, threshold=threshold)
    if threshold is not None:
        keep = d[a, b] <= threshold
        a, b = a[keep], b[keep]
    return Pairs(*(each.to(difference.device) for each in choose(d, a, b)))


def match_costs(
    d: np.ndarray, count: int, *, method: Matching, seed: int, threshold: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`match` on a finite array, in any order; with a threshold, pairs above it may be among them."""
    if method == "optimal":
        return _optimal(d, count, threshold)
    if method == "greedy":
        return _greedy(d, count)
    if method == "random":
        return _random(d, count, seed)
    raise ValueError(f"unknown matching {method!r}: choose 'optimal', 'greedy' or 'random'")


def choose(d: np.ndarray, a: np.ndarray, b: np.ndarray) -> Pairs:
    """These pairs with their costs, sorted by `a`."""
    order = np.argsort(a)
    a, b = a[order], b[order]
    return Pairs(torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(d[a, b]))


def _optimal(d: np.ndarray, count: int, threshold: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Exact minimum-cost matching with `count` pairs, or with as many as stay under the threshold."""
    rows, columns = d.shape
    if count == 0:
        return _no_pairs()
    if threshold is not None:
        # What a pair gains, with a grain more, so that a pair exactly at the threshold gains something too; pairs above
        # gain nothing and are dropped by `match`.
        d = np.where(d <= threshold, d - threshold - (1e-12 * threshold or 1.0), 0.0)
    if count == min(d.shape):
        return linear_sum_assignment(d)
    # k-cardinality assignment: rows - count dummy columns, cheaper than any real one, are all taken, each by a unit of
    # A that is left over; real columns left over need no partner. Rows that will likely be left over come first, which
    # spares the solver most of its detours.
    hardest = np.argsort(-d.min(axis=1), kind="stable")
    dummies = np.full((rows, rows - count), d.min() - (np.ptp(d) or abs(d.max()) or 1.0))
    a, b = linear_sum_assignment(np.concatenate([d[hardest], dummies], axis=1))
    real = b < columns
    return hardest[a[real]], b[real]


def _greedy(d: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pair by pair in ascending order of d; equal values in order of (row, column)."""
    columns = d.shape[1]
    free_a, free_b = np.ones(d.shape[0], bool), np.ones(columns, bool)
    a: list[int] = []
    b: list[int] = []
    ascending = np.argsort(d, axis=None, kind="stable")
    step = 16 * max(1, *d.shape)  # candidates already spoken for are dropped a chunk at a time, not one by one
    for start in range(0, ascending.size, step):
        i, j = np.divmod(ascending[start : start + step], columns)
        open_ = free_a[i] & free_b[j]
        for u, v in zip(i[open_].tolist(), j[open_].tolist(), strict=True):
            if len(a) < count and free_a[u] and free_b[v]:
                a.append(u)
                b.append(v)
                free_a[u] = free_b[v] = False
        if len(a) == count:
            break
    return np.array(a, dtype=np.int64), np.array(b, dtype=np.int64)


def _random(d: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.permutation(d.shape[0])[:count], rng.permutation(d.shape[1])[:count]


def _no_pairs() -> tuple[np.ndarray, np.ndarray]:
    return np.empty(0, np.int64), np.empty(0, np.int64)
