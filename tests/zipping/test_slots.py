"""Slots against brute force: which slot a new unit takes, and with whom it shares weights there."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskzip.planning.plan import Quota
from taskzip.zipping.slots import assign_slots, pair_in_slots

ALL = Quota(0)
"""None come first: all units are put into slots at once."""


class Case(NamedTuple):
    """Joint units in slots, some of which may hold several or none, and the cost of joining each."""

    cost: np.ndarray
    slots: np.ndarray
    count: int


@st.composite
def cases(draw: st.DrawFn, most: int = 4) -> Case:
    count, joint, new = (draw(st.integers(0, most)) for _ in range(3))
    joint = joint if count else 0
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cost = rng.exponential(size=(joint, new)) * rng.choice([0.0, 1.0, 1e6], size=(joint, new), p=[0.2, 0.7, 0.1])
    return Case(cost, rng.integers(0, max(count, 1), size=joint), count)


def in_slots(case: Case) -> np.ndarray:
    """By definition: the cost of the nearest joint unit in each slot; more than any of these where there is none."""
    table = np.full((case.count, case.cost.shape[1]), np.nan)
    for slot, unit in np.ndindex(*table.shape):
        there = [case.cost[j, unit] for j in range(len(case.slots)) if case.slots[j] == slot]
        table[slot, unit] = min(there, default=np.nan)
    return np.where(np.isnan(table), 2 * np.nanmax(table, initial=0.0) + 1, table)


def taken_by(case: Case, method: str, seed: int = 0) -> np.ndarray:
    return assign_slots(case.cost, case.slots, case.count, ALL, method=method, seed=seed)  # type: ignore[arg-type]


def assert_filled(case: Case, taken: np.ndarray) -> None:
    """Every unit has a slot of its own, no old one that no joint unit stands in; new ones follow in order."""
    new = case.cost.shape[1]
    assert taken.shape == (new,) and len(set(taken.tolist())) == new
    fresh = taken[taken >= case.count]
    assert len(fresh) >= max(0, new - case.count)
    assert set(taken[taken < case.count].tolist()) <= set(case.slots.tolist())
    assert fresh.tolist() == list(range(case.count, case.count + len(fresh)))
    assert (taken >= 0).all()


@given(cases())
def test_optimal_slots_cost_least(case: Case) -> None:
    taken = taken_by(case, "optimal")
    assert_filled(case, taken)
    table, new = in_slots(case), case.cost.shape[1]
    if case.count >= new:
        ways = [sum(table[s, u] for u, s in enumerate(way)) for way in itertools.permutations(range(case.count), new)]
    else:
        ways = [sum(table[s, u] for s, u in enumerate(way)) for way in itertools.permutations(range(new), case.count)]
    old = [(slot, unit) for unit, slot in enumerate(taken) if slot < case.count]
    empty = min(case.count, new) - len(old)  # pairs with slots in which nothing stands
    found = sum(table[slot, unit] for slot, unit in old) + empty * table.max(initial=0.0)
    assert found == pytest.approx(min(ways), rel=1e-9, abs=1e-12)


@given(cases(6))
def test_greedy_slots_are_taken_cheapest_first(case: Case) -> None:
    taken = taken_by(case, "greedy")
    assert_filled(case, taken)
    table, wanted = in_slots(case), {}
    there = set(case.slots.tolist())
    pairs = sorted((table[s, u], s, u) for s in there for u in range(table.shape[1]))
    for _, slot, unit in pairs:
        if slot not in wanted.values() and unit not in wanted:
            wanted[unit] = slot
    assert {unit: slot for unit, slot in enumerate(taken.tolist()) if slot < case.count} == wanted


@given(cases(6), st.integers(0, 99))
def test_random_slots_do_not_look_at_the_cost(case: Case, seed: int) -> None:
    taken = taken_by(case, "random", seed)
    assert_filled(case, taken)
    other = case._replace(cost=case.cost[:, ::-1] + 1)
    assert (taken_by(other, "random", seed) == taken).all()


def test_an_empty_slot_is_the_last_choice() -> None:
    cost = np.array([[5.0, 9.0], [9.0, 9.0]])
    taken = assign_slots(cost, np.array([0, 2]), 4, ALL, method="optimal", seed=0)
    assert taken.tolist() == [0, 2]


def test_of_several_joint_units_in_a_slot_the_nearest_counts() -> None:
    cost = np.array([[9.0, 9.0], [1.0, 5.0], [2.0, 2.0]])
    taken = assign_slots(cost, np.array([1, 1, 0]), 2, ALL, method="optimal", seed=0)
    assert taken.tolist() == [1, 0]


def test_nothing_to_pair_with() -> None:
    for count in (0, 2):
        taken = assign_slots(np.empty((0, 3)), np.empty(0, np.int64), count, ALL, method="optimal", seed=0)
        assert taken.tolist() == list(range(count, count + 3))
    assert assign_slots(np.empty((2, 0)), np.array([0, 1]), 2, ALL, method="greedy", seed=0).tolist() == []


# --- who shares weights --------------------------------------------------------------------------------------------


Pairing = tuple[Case, np.ndarray, int, float | None]
"""A case, the slots of the new units, how many pairs, and a threshold."""


@st.composite
def pairings(draw: st.DrawFn) -> Pairing:
    case = draw(cases(6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    new = case.cost.shape[1]
    taken = rng.permutation(case.count + new)[:new]
    costs = [None, 0.0, *np.unique(case.cost)[:8].tolist()]
    return case, taken, draw(st.integers(0, 7)), draw(st.sampled_from(costs))


@given(pairings())
def test_the_cheapest_pairs_within_slots(pairing: Pairing) -> None:
    case, taken, count, threshold = pairing
    pairs = pair_in_slots(case.cost, case.slots, taken, count=count, threshold=threshold, method="optimal", seed=0)
    able = []
    for unit, slot in enumerate(taken):
        there = [(case.cost[j, unit], j) for j in range(len(case.slots)) if case.slots[j] == slot]
        if there and (threshold is None or min(there)[0] <= threshold):
            able.append(min(there)[0])
    assert sorted(pairs.cost.tolist()) == sorted(able)[:count]
    a, b = pairs.a.tolist(), pairs.b.tolist()
    assert a == sorted(a) and len(set(a)) == len(a) and len(set(b)) == len(b)
    for joint, unit, cost in zip(a, b, pairs.cost.tolist(), strict=True):
        assert case.slots[joint] == taken[unit] and case.cost[joint, unit] == cost
        assert cost == min(case.cost[j, unit] for j in range(len(case.slots)) if case.slots[j] == taken[unit])


@given(pairings(), st.integers(0, 99))
def test_random_pairs_are_drawn_from_those_in_one_slot(pairing: Pairing, seed: int) -> None:
    case, taken, count, _ = pairing
    drawn = pair_in_slots(case.cost, case.slots, taken, count=count, threshold=None, method="random", seed=seed)
    able = sum(slot in case.slots for slot in taken)
    assert len(drawn.a) == min(count, able)
    assert all(case.slots[j] == taken[u] for j, u in zip(drawn.a.tolist(), drawn.b.tolist(), strict=True))
    again = pair_in_slots(case.cost, case.slots, taken, count=count, threshold=None, method="random", seed=seed)
    assert drawn.b.tolist() == again.b.tolist()


def test_random_pairs_are_not_the_cheapest() -> None:
    cost, slots = np.diag(np.arange(50.0)), np.arange(50)
    drawn = [
        frozenset(pair_in_slots(cost, slots, slots, count=5, threshold=None, method="random", seed=seed).b.tolist())
        for seed in range(5)
    ]
    assert len(set(drawn)) == 5 and frozenset(range(5)) not in drawn
