"""Classes of units that are alike: how they fall apart where places along an axis are not alike."""

from __future__ import annotations

import numpy as np

Ids = np.ndarray
"""int64 array of unit ids, one per index of a tensor axis."""

PINNED = 0
"""The class of units that never move."""


def occurrence(units: Ids) -> np.ndarray:
    """Per place along an axis, how many times its unit occurred before."""
    order = np.argsort(units, kind="stable")
    _, start, counts = np.unique(units[order], return_index=True, return_counts=True)
    before = np.empty(len(units), np.int64)
    before[order] = np.arange(len(units)) - start.repeat(counts)
    return before


def patterns(units: Ids, labels: np.ndarray) -> tuple[Ids, np.ndarray]:
    """The units along an axis, and for each a number, from 1, for the labels of its occurrences one after another."""
    order = np.argsort(units, kind="stable")
    found, start, counts = np.unique(units[order], return_index=True, return_counts=True)
    pattern = np.zeros(len(found), np.int64)
    for count in np.unique(counts).tolist():
        alike = counts == count
        rows = labels[order[start[alike][:, None] + np.arange(count)]]
        pattern[alike] = pattern.max(initial=0) + 1 + np.unique(rows, axis=0, return_inverse=True)[1].ravel()
    return found, pattern


def split(kind: np.ndarray, units: Ids, pattern: np.ndarray) -> None:
    """Units with different patterns are not alike, nor like the units of their class that are not named here."""
    keys = np.stack([kind[units], pattern])
    kind[units] = kind.max(initial=0) + 1 + np.unique(keys, axis=1, return_inverse=True)[1].ravel()
