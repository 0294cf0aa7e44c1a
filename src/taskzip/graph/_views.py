"""Reshapes: how the units along the axes of a tensor lie along the axes of another view of the same memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from taskzip.graph._units import Ids
from taskzip.graph._values import Axes, Context


def reshaped(c: Context, axes: Axes, before: tuple[int, ...], after: tuple[int, ...], reason: str) -> Axes:
    """The axes after a row-major reshape from shape `before` to shape `after`.

    A flattened channel becomes H * W columns that carry its unit; splitting them again gives the channel back. Where
    a unit would lie along two axes at once (heads cut out of a projection, say) it is pinned.
    """
    out: list[Ids | None] = [None] * len(after)
    if math.prod(before) != math.prod(after) or 0 in before:  # the same bytes read as another type; no elements
        c.pin(axes, reason)
        return tuple(out)
    for old, new in _groups(before, after):
        carrying = [i for i in old if axes[i] is not None]
        if len(carrying) != 1:
            c.pin(tuple(axes[i] for i in carrying), reason)
            continue
        ids = axes[carrying[0]]
        assert ids is not None
        spread = ids.reshape([-1 if i == carrying[0] else 1 for i in old])
        grid = np.broadcast_to(spread, [before[i] for i in old]).reshape([after[j] for j in new])
        for place, j in enumerate(new):
            along = np.moveaxis(grid, place, 0).reshape(after[j], -1)
            if (along == along[:, :1]).all():
                out[j] = along[:, 0].copy()
                break
        else:
            c.pin((ids,), reason)
    return tuple(out)


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
