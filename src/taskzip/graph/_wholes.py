"""Which units move as wholes: the channels of a group of a group-norm, where whole groups are alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from taskzip.graph._classes import PINNED, Ids, patterns, split

Facts = Sequence[tuple[Ids, np.ndarray]]
"""Units along an axis, and the number of the group, from 0, in which each place lies."""


def settle_wholes(kind: np.ndarray, facts: Facts) -> np.ndarray:
    """Draw conclusions from groups whose places keep together.

    A group may change places with others if it is full of units of one class, which lie nowhere else along the axis.
    Units of any other group stay in it. Where several axes group the same units, those groups move that lie within
    the others', and stay in these; groups that overlap do not move.

    Args:
        kind: the class of each unit; classes fall apart here, in place.
        facts: all that is known of groups.

    Returns:
        Per unit its whole, numbered from 0 in each class, -1 where the units of a class move one by one.
    """
    pinned, classes = kind == PINNED, -1
    while len(np.unique(kind)) != classes:
        classes = len(np.unique(kind))
        for units, labels in facts:
            split(kind, *patterns(units, np.where(_movable(kind, units, labels)[labels], 0, 1 + labels)))
            kind[pinned] = PINNED
        for units, groupings in _groupings(kind, facts):
            for each in _coarser(groupings):
                split(kind, units, each)
    whole = np.full(len(kind), -1)
    for units, groupings in _groupings(kind, facts):
        whole[units] = groupings[0]
    return whole


def _movable(kind: np.ndarray, units: Ids, labels: np.ndarray) -> np.ndarray:
    """Per group, whether it may change places with others."""
    full = np.zeros(1 + labels.max(), bool)
    for group in range(len(full)):
        inside = units[labels == group]
        alike = len(np.unique(kind[inside])) == 1 and kind[inside[0]] != PINNED
        full[group] = alike and not np.isin(units[labels != group], inside).any()
    return full


def _groupings(kind: np.ndarray, facts: Facts) -> list[tuple[Ids, list[np.ndarray]]]:
    """Per class that is grouped, its units, and for every different grouping the group of each of them, from 0."""
    found: dict[int, tuple[Ids, list[np.ndarray]]] = {}
    for axis, labels in facts:
        units, first = np.unique(axis, return_index=True)
        for each in np.setdiff1d(kind[units], PINNED).tolist():
            inside = kind[units] == each
            _, start, group = np.unique(labels[first[inside]], return_index=True, return_inverse=True)
            group = np.argsort(np.argsort(start))[group]  # numbered by their first units, to be compared
            if 1 < len(start) < len(group):
                known = found.setdefault(each, (units[inside], []))[1]
                if not any(np.array_equal(group, other) for other in known):
                    known.append(group)
    return list(found.values())


def _coarser(groupings: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The groupings that must stay as they are for the finest of them to move; all of them where groups overlap."""
    finest = max(groupings, key=lambda groups: groups.max())
    within = [len(np.unique(np.stack([finest, each]), axis=1).T) == 1 + finest.max() for each in groupings]
    if not all(within):
        return list(groupings)
    return [each for each in groupings if each is not finest]
