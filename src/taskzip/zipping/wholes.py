"""Units that keep together: the groups of a group-norm move as wholes, and channels inside their group as they like.

Where every task's units form equally many wholes, each whole of one task belongs to one of the other's, and units find
their partners there. Wholes are put together so that the summed cost of the best pairs inside them is least.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

from taskzip.algebra import Matching, Pairs, choose, match_costs
from taskzip.planning import Quota


def searched(cost: np.ndarray, method: Matching, seed: int) -> tuple[np.ndarray, Matching]:
    """The costs by which pairs inside of wholes are sought, and how: "random" draws costs, and takes the best."""
    if method != "random":
        return cost, method
    drawn = np.random.default_rng(seed).random(cost.shape)
    return np.where(np.isfinite(cost), drawn, np.inf), "optimal"


def partners(cost: np.ndarray, joint: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Which joint whole each whole of a new task belongs to.

    Args:
        cost: d between joint and new units, [joint, new], infinite where they have nothing in common.
        joint: the whole of each joint unit, -1 for none.
        new: the whole of each new unit; there are as many of them as joint ones.

    Returns:
        [wholes of the new task] joint wholes.
    """
    count = 1 + int(new.max())
    cost = without_infinity(cost)
    inside = [np.flatnonzero(new == each) for each in range(count)]
    total = np.zeros((count, count))
    for one in range(count):
        rows = cost[joint == one]
        for other, columns in enumerate(inside):
            part = rows[:, columns]
            total[one, other] = part[linear_sum_assignment(part)].sum()
    return linear_sum_assignment(total.T)[1]


def match_within(cost: np.ndarray, within: np.ndarray, quota: Quota, *, method: Matching, seed: int) -> Pairs:
    """`match`, where units pair only inside of wholes that belong together.

    Args:
        cost: d between joint and new units, [joint, new].
        within: where both are in wholes that belong together, [joint, new].
        quota, method, seed: as for `match`; fewer pairs than the quota where no more fit.
    """
    inside, how = searched(np.where(within, cost, np.inf), method, seed)
    most = min(quota.pairs, *cost.shape)
    limit = quota.threshold if how == method else None
    a, b = match_costs(without_infinity(inside), most, method=how, seed=seed, threshold=limit)
    good = within[a, b] & (cost[a, b] <= (np.inf if quota.threshold is None else quota.threshold))
    return choose(cost, a[good], b[good])


def without_infinity(cost: np.ndarray) -> np.ndarray:
    """Costs that are dearer than all others together in the place of infinite ones."""
    finite = np.isfinite(cost)
    return np.where(finite, cost, (1 + cost.max(initial=0, where=finite)) * (1 + min(cost.shape)))
