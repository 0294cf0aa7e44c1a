"""Units that must move together, and units that may change places: union-find with classes.

Every index of every tensor axis that could be re-ordered carries the id of a *unit*. Two ids that turn out to be the same
unit are united; units that the network treats alike form a class, and only units of one class may change places. What one
learns about the network only ever makes classes smaller, so the result does not depend on the order of learning.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

Ids = np.ndarray
"""int64 array of unit ids, one per index of a tensor axis."""

PINNED = 0
"""The class of units that never move."""


class Units:
    """All units of one network. Ids are handed out by `fresh`; everything else speaks of arrays of ids."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._class: list[int] = []
        self._classes = PINNED + 1
        self.reasons: dict[int, str] = {}

    def fresh(self, count: int) -> Ids:
        """`count` new units in a class of their own."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        self._class.extend([self._classes] * count)
        self._classes += 1
        return np.arange(start, start + count)

    def roots(self, ids: Ids) -> Ids:
        """The ids that stand for these units now."""
        return np.fromiter((self._root(i) for i in ids.tolist()), np.int64, len(ids))

    def classes(self, ids: Ids) -> np.ndarray:
        """The class of each unit."""
        return np.fromiter((self._class[self._root(i)] for i in ids.tolist()), np.int64, len(ids))

    def pin(self, ids: Ids, reason: str) -> None:
        """These units never move; the first reason given is kept for the person who asks."""
        for root in set(self.roots(ids).tolist()):
            self._class[root] = PINNED
            self.reasons.setdefault(root, reason)

    def unify(self, one: Ids, other: Ids, reason: str) -> Ids:
        """Index i of both axes is the same unit, for every i; returns the common ids."""
        one, other = self.roots(one), self.roots(other)
        pairs = set(zip(one.tolist(), other.tolist(), strict=True))
        if len(pairs) > len({a for a, _ in pairs}) or len(pairs) > len({b for _, b in pairs}):
            self.pin(np.concatenate([one, other]), reason)  # a unit cannot be two units: too entangled to move
            pairs = {(a, b) for a, b in pairs if self._root(a) != self._root(b)}
        self._split({a: self._class[b] for a, b in pairs})
        for a, b in pairs:
            self._join(a, b)
        return self.roots(one)

    def split(self, ids: Ids, keys: Sequence[Hashable]) -> None:
        """Units with different keys are not alike, nor like the units of their class that are not named here."""
        self._split(dict(zip(self.roots(ids).tolist(), keys, strict=True)))

    def _split(self, keys: dict[int, Hashable]) -> None:
        new: dict[Hashable, int] = {}
        for root, key in keys.items():
            old = self._class[root]
            if old == PINNED:
                continue
            if (old, key) not in new:
                new[old, key] = self._classes
                self._classes += 1
            self._class[root] = new[old, key]

    def _join(self, a: int, b: int) -> None:
        a, b = self._root(a), self._root(b)
        if a == b:
            return
        if self._class[b] == PINNED and self._class[a] != PINNED:
            a, b = b, a
        self._parent[b] = a
        if b in self.reasons:
            self.reasons.setdefault(a, self.reasons[b])

    def _root(self, unit: int) -> int:
        parent = self._parent
        while parent[unit] != unit:
            parent[unit] = parent[parent[unit]]
            unit = parent[unit]
        return unit
