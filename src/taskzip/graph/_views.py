"""Reshapes and cuts: how the units along the axes of a tensor lie along the axes of a view of the same memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from taskzip.graph._units import Ids
from taskzip.graph._values import Context, Strand, Strands


def reshaped(c: Context, axes: Strands, before: tuple[int, ...], after: tuple[int, ...], reason: str) -> Strands:
    """The axes after a row-major reshape from shape `before` to shape `after`.

    A flattened channel becomes H * W columns that carry its unit; splitting them again gives the channel back. An axis
    of units that is split becomes several strands. Where two axes with units of their own become one, these are pinned;
    where one of them only holds copies of the other (keys that several heads of queries read), the copies are.
    """
    out: list[Ids | Strand | None] = [None] * len(after)
    if math.prod(before) != math.prod(after) or 0 in before:  # the same bytes read as another type; no elements
        c.pin(axes, reason)
        return tuple(out)
    grids = _grids(axes)
    for old, new in _joined(_groups(before, after), [set(dims) for dims, _ in grids]):
        carrying = [(dims, grid) for dims, grid in grids if set(dims) <= set(old)]
        if len(carrying) > 1:
            carrying = _without_copies(c, carrying, reason)
        if len(carrying) != 1:
            c.pin(tuple(grid.ravel() for _, grid in carrying), reason)
            continue
        dims, grid = carrying[0]
        place = np.arange(grid.size).reshape(grid.shape).transpose(np.argsort(dims))
        place = place.reshape([before[i] if i in dims else 1 for i in old])
        place = np.broadcast_to(place, [before[i] for i in old]).reshape([after[j] for j in new])
        _lay(c, grid.ravel(), place, new, out)
    return tuple(out)


def _without_copies(c: Context, carrying: list[tuple[list[int], Ids]], reason: str) -> list[tuple[list[int], Ids]]:
    """All that carries units of its own; copies, if there is anything else, stay in their order from now on."""
    own = [each for each in carrying if not c.copies.issuperset(each[1].ravel().tolist())]
    if not own:
        return carrying
    c.pin(tuple(grid.ravel() for _, grid in carrying if c.copies.issuperset(grid.ravel().tolist())), reason)
    return own


def cut(c: Context, axes: Strands, dim: int, index: int | slice) -> Strands:
    """The axes of a part along one of them, which is gone where `index` is a number."""
    out = list(axes)
    axis = axes[dim]
    if isinstance(axis, Strand):
        dims, grid = next((dims, grid) for dims, grid in _grids(axes) if grid is axis.grid)
        kept = slice(index, index + 1 or None) if isinstance(index, int) else index
        place = np.arange(grid.size).reshape(grid.shape)[(slice(None),) * axis.dim + (kept,)]
        for i in dims:
            out[i] = None
        if place.size:
            _lay(c, grid.ravel(), place, dims, out)
    else:
        out[dim] = c.take(axis, [index] if isinstance(index, int) else index)
    if isinstance(index, int):
        del out[dim]
    return tuple(out)


def _grids(axes: Strands) -> list[tuple[list[int], Ids]]:
    """All that carries units: a grid for every set of strands, one of a single axis for any other axis of units.

    With it the axes of the tensor along which it lies, one for each of its own.
    """
    grids: dict[int, tuple[list[int], Ids]] = {}
    for axis in axes:
        if isinstance(axis, Strand) and id(axis.grid) not in grids:
            place = {a.dim: i for i, a in enumerate(axes) if isinstance(a, Strand) and a.grid is axis.grid}
            grids[id(axis.grid)] = [place[k] for k in range(axis.grid.ndim)], axis.grid
    return [*grids.values(), *(([i], ids) for i, ids in enumerate(axes) if isinstance(ids, np.ndarray))]


def _lay(c: Context, ids: Ids, place: np.ndarray, dims: Sequence[int], out: list[Ids | Strand | None]) -> None:
    """Lay the units `ids[place]` along the axes `dims` of `out`: those on which the unit depends."""
    grid = ids[place]
    varying = [k for k in range(grid.ndim) if (grid != grid.take([0], k)).any()] or [0]
    place = place[tuple(slice(None) if k in varying else 0 for k in range(grid.ndim))]
    order = place.ravel()
    if not np.array_equal(order, np.arange(len(ids))):
        c.units.take(ids, order)
    laid = ids[place]
    for dim, k in enumerate(varying):
        out[dims[k]] = Strand(laid, dim) if len(varying) > 1 else laid


def _groups(before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """Shortest runs of axes on both sides that hold the same number of elements; axes of length 1 are left out."""
    old = [i for i, size in enumerate(before) if size != 1]
    new = [j for j, size in enumerate(after) if size != 1]
    while old:
        left, right = [old.pop(0)], [new.pop(0)]
        a, b = before[left[0]], after[right[0]]
        while a != b:
            if a < b:
                left.append(old.pop(0))
                a *= before[left[-1]]
            else:
                right.append(new.pop(0))
                b *= after[right[-1]]
        yield left, right


def _joined(
    groups: Iterator[tuple[list[int], list[int]]], together: Sequence[set[int]]
) -> list[tuple[list[int], list[int]]]:
    """The same runs, those that hold strands of one grid put end to end."""
    done: list[tuple[list[int], list[int]]] = []
    for old, new in groups:
        touched = [dims for dims in together if dims & set(old)]
        for earlier in [run for run in done if any(dims & set(run[0]) for dims in touched)]:
            done.remove(earlier)
            old, new = sorted(earlier[0] + old), sorted(earlier[1] + new)
        done.append((old, new))
    return done
