"""The trade-off of cost and saving, against every plan there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from taskzip.planning.curves import Counts, Curve, PartSize, Read, Tradeoff


def chain(seed: int, *, aligned: bool = False, follows: bool = False) -> Tradeoff:
    """Three layers that read one another, with random costs and sizes."""
    rng = np.random.default_rng(seed)
    curves: list[Curve] = []
    units = rng.integers(2, 7, 3).tolist()
    inputs, writer = 5, None
    for k, n in enumerate(units):
        cost = np.cumsum([0, *np.sort(rng.exponential(size=n))]) * rng.uniform(0.01, 1)
        reads = [Read(int(rng.integers(1, 10)) * inputs, writer)]
        curves.append(Curve(f"layer{k}", cost.tolist(), [PartSize(n, 1)], 1, reads, follows))
        inputs, writer = n, None if aligned else (f"layer{k}", 0)
    return Tradeoff(curves)


def every_plan(tradeoff: Tradeoff) -> list[Counts]:
    counts = itertools.product(*(range(n + 1) for n in tradeoff.everything.values()))
    plans = [dict(zip(tradeoff.everything, each, strict=True)) for each in counts]
    return [plan for plan in plans if tradeoff.possible(plan) == plan]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("aligned", "follows"), [(False, False), (True, False), (False, True)])
def test_the_cheapest_plan_saves_enough_and_hardly_any_plan_is_cheaper(seed: int, aligned: bool, follows: bool) -> None:
    tradeoff = chain(seed, aligned=aligned, follows=follows)
    plans = every_plan(tradeoff)
    excess = []
    for fraction in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        wanted = fraction * tradeoff.saving(tradeoff.everything)
        found = tradeoff.cheapest(wanted)
        assert tradeoff.saving(found) >= wanted and tradeoff.possible(found) == found
        enough = [plan for plan in plans if tradeoff.saving(plan) >= wanted]
        least = min(map(tradeoff.cost, enough))
        assert tradeoff.cost(found) >= least
        excess.append(tradeoff.cost(found) - least)
        proportional = [{k: round(f * n) for k, n in tradeoff.everything.items()} for f in np.linspace(0, 1, 61)]
        assert tradeoff.cost(found) <= 1e-9 + min(tradeoff.cost(p) for p in proportional if p in enough)
    assert sum(excess) <= 0.02 * tradeoff.cost(tradeoff.everything)


def test_more_is_asked_than_can_be_saved() -> None:
    tradeoff = chain(0)
    assert tradeoff.cheapest(1 + tradeoff.saving(tradeoff.everything)) == tradeoff.everything


def test_a_layer_that_reads_nothing_in_common_shares_nothing() -> None:
    tradeoff = chain(1)
    plan = tradeoff.everything | {"layer0": 0}
    assert tradeoff.possible(plan) == dict.fromkeys(plan, 0)
    assert tradeoff.saving(plan) == 0


def test_pairs_without_cost_are_always_shared() -> None:
    curves = [Curve("fc", [0.0, 0.0, 0.0, 0.5], [PartSize(3, 1)], 1, [Read(4, None)])]
    assert Tradeoff(curves).cheapest(0) == {"fc": 2}


def test_parts_take_their_share_of_the_pairs_and_heads_have_many_rows() -> None:
    curves = [
        Curve("qkv", [0.0, 1, 2, 3], [PartSize(2, 4), PartSize(1, 4)], 1, [Read(10, None)]),
        Curve("out", [0.0, 1, 2], [PartSize(2, 1)], 0, [Read(8, ("qkv", 1))]),
    ]
    tradeoff = Tradeoff(curves)
    assert tradeoff.saving({"qkv": 3, "out": 2}) == 3 * 4 * 11 + 2 * 8
    assert tradeoff.saving({"qkv": 1, "out": 2}) == 1 * 4 * 11  # the one pair is of the first part


def test_pairs_cost_less_where_fewer_inputs_are_shared_and_others_follow() -> None:
    tradeoff = chain(2, follows=True)
    first, second, third = tradeoff.everything
    alone = tradeoff.cost({first: 1, second: 0, third: 0})
    half = {**tradeoff.everything, first: 1, third: 0}
    full = {**tradeoff.everything, third: 0}
    whole = tradeoff.cost(full) - tradeoff.cost({**full, second: 0})
    fraction = 1 / tradeoff.everything[first]
    assert tradeoff.cost(half) - alone == pytest.approx(whole * fraction**4)


def test_tasks_of_which_fewer_units_can_be_paired() -> None:
    curves = [
        Curve("a", [0.0] * 25, [PartSize(24, 1, (24, 16))], 2, [Read(2 * 64, None)]),
        Curve("b", [0.0] * 9, [PartSize(8, 1)], 1, [Read(10, ("a", 0))]),
    ]
    tradeoff = Tradeoff(curves)
    assert tradeoff.saving({"a": 24, "b": 0}) == (24 + 16) * 65
    assert tradeoff.saving({"a": 10, "b": 0}) == (10 + 10) * 65
    assert tradeoff.saving({"a": 10, "b": 8}) - 20 * 65 == 8 * (1 + 5)  # half of the pairs that there can be


def test_without_cross_more_is_saved_the_fewer_inputs_are_shared() -> None:
    """A shared row of two tasks saves all that both read but the common inputs once."""
    curves = [
        Curve("a", [0.0] * 5, [PartSize(4, 1)], 1, [Read(7, None)]),
        Curve("b", [0.0] * 4, [PartSize(3, 1)], 1, [Read(4, ("a", 0), 8)]),
    ]
    tradeoff = Tradeoff(curves)
    for n in (1, 2, 4):
        plan = {"a": n, "b": 3}
        assert tradeoff.expected(plan) == n * 8 + 3 * (1 + 8 - n)
        assert tradeoff.saving(plan) == n * 8 + 3 * (1 + n)
    found = tradeoff.fitting(30)
    assert tradeoff.expected(found) >= 30
