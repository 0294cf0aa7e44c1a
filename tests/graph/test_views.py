"""Reshapes, checked against what really becomes of the elements when the units change places."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskzip.graph._units import PINNED
from taskzip.graph._values import Axes, Context, Strand
from taskzip.graph._views import cut, reshaped

CASES = {
    "flatten": ((3, 4, 2, 2), 1, (3, 16), (1, np.arange(4).repeat(4))),
    "flatten and back": ((3, 16), 1, (3, 16), (1, np.arange(16))),
    "channels last": ((3, 2, 2, 4), 3, (3, 16), (1, np.tile(np.arange(4), 4))),
    "rows of pixels": ((3, 2, 2, 4), 3, (12, 4), (1, np.arange(4))),
    "batch and units": ((3, 4), 1, (12,), (0, np.tile(np.arange(4), 3))),
    "new axes of length 1": ((3, 4), 1, (1, 3, 1, 4, 1), (3, np.arange(4))),
    "squeezed": ((3, 4, 1, 1), 1, (3, 4), (1, np.arange(4))),
    "batch of one": ((1, 4, 2), 1, (4, 2), (0, np.arange(4))),
    "batch as large as the units": ((4, 4, 2), 1, (4, 8), (1, np.arange(4).repeat(2))),
}


@pytest.mark.parametrize("case", CASES)
def test_units_stay_together(case: str) -> None:
    before, dim, after, (place, order) = CASES[case]
    c = Context()
    ids = c.units.fresh(before[dim])
    out = reshaped(c, tuple(ids if i == dim else None for i in range(len(before))), before, after, "")
    assert [i for i, each in enumerate(out) if each is not None] == [place]
    assert (out[place] == ids[order]).all()
    assert (c.units.settle().classes(ids) != PINNED).all()


def test_a_flattened_unit_is_found_again() -> None:
    c = Context()
    ids = c.units.fresh(4)
    columns = reshaped(c, (None, ids, None, None), (3, 4, 2, 2), (3, 16), "")
    assert (reshaped(c, columns, (3, 16), (3, 4, 2, 2), "")[1] == ids).all()
    assert (reshaped(c, columns, (3, 16), (3, 8, 2), "")[1] == ids.repeat(2)).all()
    assert (reshaped(c, columns, (3, 16), (3, 4, 4), "")[1] == ids).all()


@pytest.mark.parametrize(
    ("before", "dims", "after"),
    [
        ((3, 4, 4), (1, 2), (3, 16)),  # two axes of units
        ((3, 4), (1,), (3, 8)),  # the same bytes as numbers of half the size
        ((0, 4), (1,), (0, 2, 2)),
    ],
)
def test_units_that_would_come_apart_are_pinned(
    before: tuple[int, ...], dims: tuple[int, ...], after: tuple[int, ...]
) -> None:
    c = Context()
    axes = tuple(c.units.fresh(n) if i in dims else None for i, n in enumerate(before))
    assert all(ids is None for ids in reshaped(c, axes, before, after, "too bad"))
    settled = c.units.settle()
    assert all(settled.reason(axes[i]) == "too bad" for i in dims)


def test_other_axes_are_left_alone() -> None:
    c = Context()
    batch, units = c.units.fresh(3), c.units.fresh(6)
    out = reshaped(c, (batch, units), (3, 6), (3, 2, 3), "")
    assert isinstance(out[0], np.ndarray) and (out[0] == batch).all()
    assert (c.units.settle().classes(batch) != PINNED).all()


def test_a_split_axis_becomes_strands() -> None:
    c = Context()
    units = c.units.fresh(6)
    _, one, other = reshaped(c, (None, units), (3, 6), (3, 2, 3), "")
    assert isinstance(one, Strand) and isinstance(other, Strand) and one.grid is other.grid
    assert one.grid.tolist() == [[0, 1, 2], [3, 4, 5]] and (one.dim, other.dim) == (0, 1)
    back = reshaped(c, (None, other, one), (3, 3, 2), (3, 6), "")
    assert back[1] is not None and back[1].tolist() == [0, 3, 1, 4, 2, 5]
    assert len(set(c.units.settle().classes(units).tolist())) == 1


def test_parts_of_strands() -> None:
    c = Context()
    strands = reshaped(c, (None, c.units.fresh(12)), (3, 12), (3, 2, 3, 2), "")
    (_, last, first) = cut(c, (None, strands[3], strands[2], strands[1])[:4], 2, 1)[:3]
    assert isinstance(first, Strand) and isinstance(last, Strand)
    assert first.grid.tolist() == [[2, 3], [8, 9]] and (first.dim, last.dim) == (0, 1)
    assert [axis.tolist() for axis in cut(c, (first, last), 0, -1)] == [[8, 9]]
    half, gone = cut(c, (first, last), 1, slice(0, 1))
    assert half.tolist() == [2, 8] and gone is None
    assert cut(c, (first, last), 1, slice(0, 0)) == (None, None)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of the same number of elements."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3]), min_size=1, max_size=5))

    def shape() -> tuple[int, ...]:
        cuts = draw(st.lists(st.booleans(), min_size=len(factors), max_size=len(factors)))
        sizes = [1]
        for factor, new in zip(factors, cuts, strict=True):
            sizes = [*sizes, factor] if new else [*sizes[:-1], sizes[-1] * factor]
        return tuple(sizes)

    return shape(), shape()


@given(reshapes(), st.data())
def test_moving_the_units_commutes_with_the_reshape(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], data: st.DataObject
) -> None:
    before, after = shapes
    c = Context()
    labelled = [data.draw(st.booleans()) and size > 1 for size in before]
    axes = tuple(c.units.fresh(size) if on else None for size, on in zip(before, labelled, strict=True))
    out = reshaped(c, axes, before, after, "")
    if data.draw(st.booleans()):  # back again, or as strands settle: each outermost one moves as a whole
        out, after = reshaped(c, out, after, before, ""), before
    out = tuple(c._one_axis(axis) for axis in out)
    settled = c.units.settle()
    axes, out = (tuple(None if ids is None else settled.roots(ids) for ids in each) for each in (axes, out))
    order = np.arange(sum(before))
    for ids in axes:
        units = np.empty(0, np.int64) if ids is None else np.unique(ids)
        kinds = settled.classes(units)
        for kind in set(kinds.tolist()) - {PINNED}:
            order[units[kinds == kind]] = data.draw(st.permutations(units[kinds == kind].tolist()))
    x = np.arange(math.prod(before)).reshape(before)
    assert (moved(x, axes, order).reshape(after) == moved(x.reshape(after), out, order)).all()


def moved(x: np.ndarray, axes: Axes, order: np.ndarray) -> np.ndarray:
    """The k-th occurrence of `order[unit]` where the k-th occurrence of a unit was."""
    for dim, ids in enumerate(axes):
        if ids is not None:
            index = np.empty(len(ids), np.int64)
            for unit in np.unique(ids):
                index[ids == unit] = np.flatnonzero(ids == order[unit])
            x = x.take(index, dim)
    return x
