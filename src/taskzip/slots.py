"""Which slot a unit takes: units of several tasks in one slot of a joint space belong together.

Where inputs are *aligned* (Sec. 3.7), all units of a space are paired, whether they share their weights or not, and a
later layer reads the pairs. A slot may then hold several joint units, none of which share weights with the others.
"""

from __future__ import annotations

import numpy as np

from taskzip.matching import Matching, Pairs, choose, match_costs


def assign_slots(cost: np.ndarray, slots: np.ndarray, count: int, *, method: Matching, seed: int) -> np.ndarray:
    """A slot for every unit of a new task: as many as possible take one that is there, at the least cost.

    Args:
        cost: d between joint and new units, [joint, new]; of several joint units in a slot the nearest counts.
        slots: the slot of each joint unit, [joint]; slots that none of them has cost more than any other.
        count: how many slots there are.
        method, seed: as for `match`.

    Returns:
        [new] slots; those from `count` on are new ones.
    """
    new = cost.shape[1]
    nearest = np.full((count, new), np.inf)
    np.minimum.at(nearest, slots, cost)
    finite = nearest[np.isfinite(nearest)]
    nearest[~np.isfinite(nearest)] = 2 * finite.max(initial=0) + 1
    a, b = match_costs(nearest, min(count, new), method=method, seed=seed)
    taken = np.full(new, -1)
    taken[b] = a
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
) -> Pairs:
    """Which new units share the weights of a joint unit in their slot: the `count` cheapest.

    Args:
        cost: d between joint and new units, [joint, new].
        slots: the slot of each joint unit.
        taken: the slot of each new unit.
        count: how many pairs at most.
        threshold: only where d is at most this.
        method, seed: as for `match`; "random" draws among the pairs.
    """
    same = np.where(slots[:, None] == taken[None, :], cost, np.inf)
    if not same.size:
        return choose(cost, *np.empty((2, 0), np.int64))
    a, b = same.argmin(axis=0), np.arange(same.shape[1])
    d = same[a, b]
    able = np.flatnonzero(np.isfinite(d) if threshold is None else d <= threshold)
    order = np.random.default_rng(seed).permutation(able) if method == "random" else able[np.argsort(d[able])]
    return choose(cost, a[order[:count]], b[order[:count]])
