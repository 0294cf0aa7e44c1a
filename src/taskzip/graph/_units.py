"""Which units move together, and which may change places.

Every index of every tensor axis that could be re-ordered carries the id of a *unit*. While the graph is read, facts
are only collected: the units of two axes are the same, some never move, an axis is a part of another. `Units.settle`
draws the conclusions, so they do not depend on the order in which the facts were learned.

To exchange two units means, along every axis, to exchange the first places where they occur, the second ones, and so
on. That is possible for units that occur equally often along every axis and, where an axis is cut from another or put
in a new order, with the same occurrences in the same order. Such units form a *class*.

Units of a class may also keep together in *wholes*, all of one size, as the channels in a group of a group-norm do:
then only wholes change places, and units inside of a whole.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from taskzip.graph._classes import PINNED, Ids, occurrence, patterns, split
from taskzip.graph._wholes import settle_wholes

__all__ = ["PINNED", "Ids", "SettledUnits", "Units"]


class Units:
    """What is known of all units of one network. Ids are handed out by `fresh`; the rest speaks of arrays of ids."""

    def __init__(self) -> None:
        self._count = 0
        self._same: list[tuple[Ids, Ids]] = []
        self._parts: list[tuple[Ids, np.ndarray]] = []
        self._taken: list[tuple[Ids, np.ndarray]] = []
        self._pins: list[tuple[Ids, str]] = []
        self._together: list[tuple[Ids, np.ndarray]] = []

    def fresh(self, count: int) -> Ids:
        """An axis of `count` new units."""
        ids = np.arange(self._count, self._count + count)
        self._count += count
        self._parts.append((ids, np.ones(count, bool)))
        return ids

    def unify(self, one: Ids, other: Ids) -> Ids:
        """Index i of both axes is the same unit, for every i; returns the common axis."""
        self._same.append((one, other))
        return one

    def pin(self, ids: Ids, reason: str) -> None:
        """These units never move; the first reason given is kept for the person who asks."""
        self._pins.append((ids, reason))

    def fuse(self, ids: Ids, count: int) -> Ids:
        """An axis falls into `count` runs of equal length, which move as wholes; returns the unit of each run."""
        runs = ids.reshape(count, -1)
        self.unify(runs.ravel(), runs[:, 0].repeat(runs.shape[1]))
        return runs[:, 0].copy()

    def part(self, ids: Ids, inside: np.ndarray) -> Ids:
        """The part of an axis where the mask `inside` is true, by itself."""
        self.divide(ids, inside)
        return ids[inside]

    def divide(self, ids: Ids, labels: np.ndarray) -> None:
        """Places along an axis with different labels are not alike."""
        self._parts.append((ids, labels))

    def keep_together(self, ids: Ids, labels: np.ndarray) -> None:
        """Places along an axis with equal labels, from 0, stay together; all labels are equally many times there."""
        self._together.append((ids, labels))

    def take(self, ids: Ids, index: np.ndarray) -> Ids:
        """An axis that holds at each place what another one holds at `index`."""
        self._taken.append((ids, index))
        return ids[index]

    def settle(self) -> SettledUnits:
        """What follows from all that was learned."""
        root = self._roots()
        kind = np.full(self._count, PINNED + 1)
        for ids, labels in self._parts:
            split(kind, *patterns(root[ids], labels))
        for ids, index in self._taken:
            units = root[ids]
            found, pattern = patterns(units[index], occurrence(units)[index])
            elsewhere = np.setdiff1d(units, found)
            split(kind, np.append(found, elsewhere), np.append(pattern, np.zeros(len(elsewhere), np.int64)))
        why = np.full(self._count, -1)
        for index, (ids, _) in reversed(list(enumerate(self._pins))):
            why[root[ids]] = index
        kind[why >= 0] = PINNED
        whole = settle_wholes(kind, [(root[ids], labels) for ids, labels in self._together])
        return SettledUnits(root, kind, why, [reason for _, reason in self._pins], whole)

    def _roots(self) -> Ids:
        """Per id, the first id of the same unit."""
        nothing = np.empty(0, np.int64)
        one = np.concatenate([nothing, *(a for a, _ in self._same)])
        other = np.concatenate([nothing, *(b for _, b in self._same)])
        edges = coo_matrix((np.ones(len(one), bool), (one, other)), shape=(self._count, self._count))
        _, label = connected_components(edges, directed=False)
        return np.unique(label, return_index=True)[1][label]


class SettledUnits:
    """Per id its unit (the first id of it), per unit its class and, where it is pinned, why."""

    def __init__(self, root: Ids, kind: np.ndarray, why: np.ndarray, reasons: list[str], whole: np.ndarray) -> None:
        self._root, self._kind, self._why, self._reasons, self._whole = root, kind, why, reasons, whole

    def roots(self, ids: Ids) -> Ids:
        """The ids that stand for these units."""
        return self._root[ids]

    def classes(self, ids: Ids) -> np.ndarray:
        """The class of each unit."""
        return self._kind[self._root[ids]]

    def wholes(self, ids: Ids) -> np.ndarray:
        """The whole of each unit, -1 where it need not keep together with others of its class."""
        return self._whole[self._root[ids]]

    def reason(self, ids: Ids) -> str:
        """Why the first of these units that is pinned may not move, or ""."""
        pinned = self._why[self._root[ids]]
        pinned = pinned[pinned >= 0]
        return self._reasons[pinned[0]] if len(pinned) else ""
