"""Which units are the same for which tasks: those that every layer that wrote them so far shares.

A slot of a residual stream holds the sum of what several layers write. With `zip(cross=False)` shared units read only
what tasks have in common, so that a unit of a stream counts as shared only as long as all of these layers share it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from taskzip.zipping.correspondence import JointLayers
from taskzip.zipping.joining import JointLayer
from taskzip.zipping.members import Member, Slots
from taskzip.zipping.spaces import Part


class CommonUnits:
    """A label for every unit that was written so far; equal labels in two tasks mean a common unit."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._labels: list[dict[int, np.ndarray]] = [{} for _ in members]
        self._new = itertools.count()
        self._known: dict[tuple[int, int], int] = {}

    def slots(self) -> dict[int, Slots]:
        """Per task labels instead of slots, of the spaces that were put into order and written."""
        return {
            t: {space: (joint, labels[space]) for space, (joint, _) in member.slots.items() if space in labels}
            for t, (member, labels) in enumerate(zip(self._members, self._labels, strict=True))
        }

    def of(self, part: Part) -> dict[int, np.ndarray] | None:
        """The labels of a part's units by task; None where nothing wrote them before."""
        if not all(space in self._labels[t] for t, space in part.spaces.items()):
            return None
        return {t: self._labels[t][space] for t, space in part.spaces.items()}

    def write(self, layers: JointLayers, parts: Sequence[Part], joints: Sequence[JointLayer]) -> None:
        """A layer was zipped, and its units are where they stay; those that it does not share are not common."""
        written = {
            (t, space): self._draw(len(rows))
            for t, layer in layers.items()
            for space, rows in self._members[t].structure.parts(layer).items()
        }
        for part, joint in zip(parts, joints, strict=False):
            for owners, group in joint.groups.items():
                label = self._draw(len(group.units))
                for k, t in enumerate(owners):
                    written[t, part.spaces[t]][group.units[:, k].cpu().numpy()] = label
        for (t, space), labels in written.items():
            before = self._labels[t].get(space)
            self._labels[t][space] = labels if before is None else self._combined(before, labels)

    def _draw(self, count: int) -> np.ndarray:
        return np.fromiter(itertools.islice(self._new, count), np.int64, count)

    def _combined(self, before: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Equal only where both are."""
        pairs = zip(before.tolist(), labels.tolist(), strict=True)
        return np.array([self._known.setdefault(pair, next(self._new)) for pair in pairs], np.int64)
