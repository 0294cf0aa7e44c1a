"""Which slot a unit takes: units of several tasks in one slot of a joint space belong together.

Where inputs are *aligned*, as if all units of the layer before were merged (Sec. 3.7), all units of a space are paired,
whether they share their weights or not, and a later layer reads the pairs. A slot may then hold several joint units,
none of which share weights with the others.
"""

from __future__ import annotations

import numpy as np

from taskzip.algebra import Matching, Pairs, choose, match_costs
from taskzip.planning import Quota
from taskzip.zipping.wholes import searched, without_infinity


def assign_slots(
    cost: np.ndarray,
    slots: np.ndarray,
    count: int,
    quota: Quota,
    *,
    method: Matching,
    seed: int,
    within: np.ndarray | None = None,
) -> np.ndarray:
    """A slot for every unit of a new task: first for those that are to share weights, then for the others.

    Args:
        cost: d between joint and new units, [joint, new], infinite where they have nothing in common; of several joint
            units in a slot the nearest counts.
        slots: the slot of each joint unit, [joint].
        count: how many slots there are.
        quota: how many pairs will share their weights, and up to which d; these come first.
        method, seed: as for `match`.
        within: where joint and new units are in wholes that belong together, [joint, new]; None where they are free.

    Returns:
        [new] slots; those from `count` on are new ones, for units that have nothing in common with what is there.
    """
    new = cost.shape[1]
    if within is not None:
        cost, method = searched(np.where(within, cost, np.inf), method, seed)
    nearest = np.full((count, new), np.inf)
    np.minimum.at(nearest, slots, cost)
    taken = np.full(new, -1)
    for pairs, threshold in ((quota.pairs, quota.threshold), (new, None)):
        a, b = np.setdiff1d(np.arange(count), taken), np.flatnonzero(taken < 0)
        d = nearest[np.ix_(a, b)]
        limit = np.nanmax(d, initial=0, where=np.isfinite(d)) if threshold is None else threshold
        finite = np.where(np.isfinite(d), d, 2 * limit + 1) if within is None else without_infinity(d)
        i, j = match_costs(finite, min(pairs, *d.shape), method=method, seed=seed, threshold=threshold)
        good = d[i, j] <= limit
        taken[b[j[good]]] = a[i[good]]
    left = taken < 0
    taken[left] = count + np.arange(left.sum())
    return taken


def pair_in_slots(
    cost: np.ndarray,
    slots: np.ndarray,
    taken: np.ndarray,
    *,
    count: int,
    threshold: float | None,
    method: Matching,
    seed: int,
    first: np.ndarray | None = None,
) -> Pairs:
    """Which new units share the weights of a joint unit in their slot: the `count` cheapest.

    Args:
        cost: d between joint and new units, [joint, new].
        slots: the slot of each joint unit.
        taken: the slot of each new unit.
        count: how many pairs at most.
        threshold: only where d is at most this.
        method, seed: as for `match`; "random" draws among the pairs.
        first: pairs that come before all others, [joint, new].
    """
    same = np.where(slots[:, None] == taken[None, :], cost, np.inf)
    if not same.size:
        return choose(cost, *np.empty((2, 0), np.int64))
    a, b = same.argmin(axis=0), np.arange(same.shape[1])
    d = same[a, b]
    able = np.flatnonzero(np.isfinite(d) if threshold is None else d <= threshold)
    order = np.random.default_rng(seed).permutation(able) if method == "random" else able[np.argsort(d[able])]
    if first is not None:
        order = order[np.argsort(~first[a, b][order], kind="stable")]
    return choose(cost, a[order[:count]], b[order[:count]])
