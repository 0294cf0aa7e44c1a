"""Facts about units, and what follows from them, whatever the order in which they are learned."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from taskzip.graph._units import PINNED, Ids, SettledUnits, Units


def groups(settled: SettledUnits, ids: Ids) -> list[int]:
    """Which of these units are alike, by the first index of each class; -1 for pinned ones."""
    kinds = settled.classes(ids).tolist()
    return [-1 if kind == PINNED else kinds.index(kind) for kind in kinds]


def test_the_units_of_a_new_axis_are_alike_and_unlike_all_others() -> None:
    units = Units()
    one, other = units.fresh(3), units.fresh(2)
    settled = units.settle()
    assert one.tolist() == [0, 1, 2] and other.tolist() == [3, 4]
    assert groups(settled, np.concatenate([one, other])) == [0, 0, 0, 3, 3]
    assert settled.reason(one) == ""


def test_no_units_at_all() -> None:
    settled = Units().settle()
    assert settled.roots(np.empty(0, np.int64)).tolist() == []


def test_two_axes_become_one() -> None:
    units = Units()
    one, other = units.fresh(3), units.fresh(3)
    assert units.unify(one, other) is one
    settled = units.settle()
    assert settled.roots(other).tolist() == settled.roots(one).tolist() == [0, 1, 2]
    assert groups(settled, other) == [0, 0, 0]


def test_pins_travel_to_all_names_of_a_unit_and_the_first_reason_counts() -> None:
    units = Units()
    one, other, third = units.fresh(3), units.fresh(3), units.fresh(3)
    units.pin(third[1:], "first")
    units.pin(third[:2], "second")
    units.unify(one, other)
    units.unify(other, third)
    settled = units.settle()
    assert groups(settled, one) == [-1, -1, -1]
    assert [settled.reason(one[i:]) for i in range(3)] == ["second", "first", "first"]


def test_a_part_of_an_axis_is_not_like_the_rest() -> None:
    units = Units()
    axis = units.fresh(5)
    assert units.part(axis, np.array([True, False, True, False, False])).tolist() == [0, 2]
    assert groups(units.settle(), axis) == [0, 1, 0, 1, 1]


def test_what_was_learned_of_one_axis_holds_for_its_twin() -> None:
    units = Units()
    one, other = units.fresh(4), units.fresh(4)
    units.part(one, np.array([True, True, False, False]))
    units.part(other, np.array([False, True, True, False]))
    units.unify(one, other)
    assert groups(units.settle(), one) == [0, 1, 2, 3]


def test_units_that_occur_several_times() -> None:
    units = Units()
    channels, columns = units.fresh(3), units.fresh(6)
    units.unify(columns, channels.repeat(2))
    settled = units.settle()
    assert settled.roots(columns).tolist() == [0, 0, 1, 1, 2, 2]
    assert groups(settled, channels) == [0, 0, 0]


def test_a_part_with_the_same_occurrences_of_each_unit_keeps_them_alike() -> None:
    for inside, expected in [
        ([True, False, True, False, True, False], [0, 0, 0]),
        ([True, False, True, False, False, True], [0, 0, 2]),
        ([True, True, True, False, False, False], [0, 1, 2]),
    ]:
        units = Units()
        channels = units.fresh(3)
        units.part(channels.repeat(2), np.array(inside))
        assert groups(units.settle(), channels) == expected


def test_an_axis_that_meets_itself_in_two_orders_cannot_move_single_units() -> None:
    units = Units()
    rows = units.fresh(4)
    units.unify(rows, rows[[1, 0, 3, 2]])
    settled = units.settle()
    assert settled.roots(rows).tolist() == [0, 0, 2, 2]
    assert groups(settled, rows) == [0, 0, 0, 0]  # two blocks of two, which may change places


def test_runs_of_an_axis_become_units() -> None:
    units = Units()
    axis = units.fresh(6)
    assert units.fuse(axis, 2).tolist() == [0, 3]
    settled = units.settle()
    assert settled.roots(axis).tolist() == [0, 0, 0, 3, 3, 3]
    assert groups(settled, axis) == [0] * 6


def test_an_axis_in_a_new_order_keeps_single_units_alike() -> None:
    units = Units()
    axis = units.fresh(4)
    assert units.take(axis, np.array([2, 0, 3, 1])).tolist() == [2, 0, 3, 1]
    assert groups(units.settle(), axis) == [0, 0, 0, 0]


def test_units_whose_places_are_taken_in_different_orders_are_not_alike() -> None:
    for index, expected in [
        ([1, 0, 2, 3], [0, 0, 2, 2]),
        ([1, 0, 3, 2], [0, 0, 0, 0]),
        ([0, 2, 1, 3], [0, 0, 0, 0]),
        ([0, 2], [0, 0, 0, 0]),
        ([0, 3], [0, 0, 2, 2]),
        ([0, 1], [0, 0, 2, 2]),
        ([0, 1, 2, 3, 0], [0, 0, 2, 2]),
    ]:
        units = Units()
        axis = units.fresh(4)
        units.fuse(axis, 2)
        units.take(axis, np.array(index))
        assert groups(units.settle(), axis) == expected


def test_units_that_do_not_occur_on_the_same_axes_are_not_alike() -> None:
    units = Units()
    whole, left, right = units.fresh(5), units.fresh(2), units.fresh(3)
    units.unify(whole, np.concatenate([left, right]))
    assert groups(units.settle(), whole) == [0, 0, 2, 2, 2]


Fact = Callable[[Units, list[Ids]], object]


@st.composite
def facts(draw: st.DrawFn) -> list[Fact]:
    """Unions, pins and parts among five axes of four units."""

    def axis() -> Callable[[list[Ids]], Ids]:
        index, order = (
            draw(st.integers(0, 4)),
            draw(st.sampled_from([[0, 1, 2, 3], [0, 0, 1, 1], [1, 0, 3, 2], [2, 3, 0, 1]])),
        )
        return lambda axes: axes[index][order]

    found: list[Fact] = []
    for _ in range(draw(st.integers(0, 7))):
        kind, one, other = draw(st.sampled_from(["unify", "unify", "pin", "part", "take"])), axis(), axis()
        mask = np.array(draw(st.lists(st.booleans(), min_size=4, max_size=4)))
        if kind == "unify":
            found.append(lambda units, axes, one=one, other=other: units.unify(one(axes), other(axes)))
        elif kind == "take":
            found.append(lambda units, axes, one=one, mask=mask: units.take(one(axes), np.argsort(mask, kind="stable")))
        elif kind == "pin":
            found.append(lambda units, axes, one=one, mask=mask: units.pin(one(axes)[mask], "because"))
        else:
            found.append(lambda units, axes, one=one, mask=mask: units.part(one(axes), mask))
    return found


@given(facts(), st.randoms(use_true_random=False))
def test_the_order_of_learning_does_not_matter(found: list[Fact], random: object) -> None:
    results = []
    for attempt in range(2):
        units = Units()
        axes = [units.fresh(4) for _ in range(5)]
        if attempt:
            random.shuffle(found)  # type: ignore[attr-defined]
        for fact in found:
            fact(units, axes)
        settled = units.settle()
        everything = np.concatenate(axes)
        results.append((settled.roots(everything).tolist(), groups(settled, everything)))
    assert results[0] == results[1]


@given(facts())
def test_alike_means_equally_often_on_every_axis_and_in_every_part(found: list[Fact]) -> None:
    units = Units()
    axes = [units.fresh(4) for _ in range(5)]
    seen: list[tuple[Ids, np.ndarray]] = []
    learn = units.part
    units.part = lambda ids, inside: (seen.append((ids, inside)), learn(ids, inside))[1]  # type: ignore[method-assign]
    for fact in found:
        fact(units, axes)
    settled = units.settle()
    everything = np.concatenate(axes)
    for ids, inside in [*seen, *((axis, np.ones(4, bool)) for axis in axes)]:
        roots = settled.roots(ids)
        places = {unit: inside[roots == unit].tolist() for unit in settled.roots(everything).tolist()}
        for unit, where in places.items():
            for twin, there in places.items():
                kind = settled.classes(np.array([unit, twin]))
                assert where == there or kind[0] != kind[1] or kind[0] == PINNED
