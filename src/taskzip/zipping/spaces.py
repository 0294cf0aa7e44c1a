"""Joint spaces: which spaces of several networks hold the same units.

Where layers of two networks correspond, so do the spaces in which their units lie. A residual stream is a space into
which several layers write: all of them need one order of its units, or permute them when adding (Sec. 3.7).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from taskzip.graph import Layer
from taskzip.planning import Quota
from taskzip.zipping.correspondence import JointLayers
from taskzip.zipping.members import Member


@dataclass(frozen=True)
class Part:
    """The units of a joint layer that lie in one joint space.

    Attributes:
        joint: the joint space.
        spaces: per task, the space.
        rows: per task, the rows of each unit, [units, rows of a unit].
    """

    joint: int
    spaces: Mapping[int, int]
    rows: Mapping[int, np.ndarray]

    @property
    def units(self) -> int:
        """How many pairs there can be at most when a task is added."""
        return max(self.pairable())

    def pairable(self) -> list[int]:
        """Per task but the first, how many of its units can be paired when it is added to those before it."""
        lengths = list(map(len, self.rows.values()))
        return [min(n, max(lengths[:k])) for k, n in enumerate(lengths) if k]

    def quotas(self, quota: Quota) -> dict[int, Quota]:
        """Per task but the first, what it may share."""
        _, *added = self.rows
        return {t: quota.of(n, self.units) for t, n in zip(added, self.pairable(), strict=True)}


class JointSpaces:
    """The joint spaces of a list of joint layers."""

    def __init__(self, members: Sequence[Member], layers: Sequence[JointLayers]) -> None:
        self._members = members
        self._joint: dict[tuple[int, int], int] = {}
        for layer in layers:
            for spaces in self._met(layer):
                self._unite(spaces)
        self._writers: dict[int, list[int]] = {}
        self._read_first: set[int] = set()
        self._twisted = {joint for joint in self._joint.values() if self._is_twisted(joint)}
        tasks: dict[int, set[int]] = {}
        for index, layer in enumerate(layers):
            for part in self.parts(layer):
                self._writers.setdefault(part.joint, []).append(index)
                if tasks.setdefault(part.joint, set(part.spaces)) != set(part.spaces):
                    self._twisted.add(part.joint)
            for t, each in layer.items():
                for joint in self._read(t, each.columns):
                    if joint not in self._writers:
                        self._read_first.add(joint)
        self._twisted |= self._read_first

    @property
    def streams(self) -> set[int]:
        """The joint spaces that several joint layers write."""
        return {joint for joint, writers in self._writers.items() if len(writers) > 1}

    @property
    def read_first(self) -> set[int]:
        """The joint spaces that are read before a layer writes them: an embedding begins them, for one."""
        return self._read_first

    @property
    def twisted(self) -> set[int]:
        """The joint spaces of which no single layer can choose the order.

        They are read before they are written, are several spaces of one network, or have layers that some tasks lack.
        """
        return self._twisted

    def members_of(self, joint: int) -> list[tuple[int, int]]:
        """The (task, space) of a joint space."""
        return [key for key, each in self._joint.items() if each == joint]

    def wholes(self, joint: int) -> dict[int, np.ndarray] | None:
        """Per task, to which whole each unit of its space belongs; None where not all of them have equally many."""
        found = {t: self._members[t].structure.spaces[space].wholes for t, space in self.members_of(joint)}
        known = {t: each for t, each in found.items() if each is not None}
        alike = len({int(each.max()) for each in known.values()}) == 1
        return known if alike and len(known) == len(self.members_of(joint)) else None

    def parts(self, layer: Mapping[int, Layer]) -> list[Part]:
        """The units of a joint layer by joint space, where at least two tasks have them."""
        found: dict[int, dict[int, list[tuple[int, np.ndarray]]]] = {}
        for t, each in alike(layer).items():
            for space, rows in self._members[t].structure.parts(each).items():
                if (t, space) in self._joint:
                    found.setdefault(self._joint[t, space], {}).setdefault(t, []).append((space, rows))
        parts = []
        for joint, tasks in found.items():
            alone = {t: each[0] for t, each in tasks.items() if len(each) == 1}
            height = next(iter(alone.values()))[1].shape[1] if alone else 0
            level = {t: each for t, each in alone.items() if each[1].shape[1] == height}
            if len(level) > 1:
                parts.append(Part(joint, {t: s for t, (s, _) in level.items()}, {t: r for t, (_, r) in level.items()}))
        return parts

    def _met(self, layer: Mapping[int, Layer]) -> list[list[tuple[int, int]]]:
        """The spaces of one joint layer that belong together: the first with the first, and so on."""
        spaces = [[(t, space) for space in each.spaces] for t, each in alike(layer).items()]
        spaces = [each for each in spaces if len(each) == len(spaces[0])]
        return [list(each) for each in zip(*spaces, strict=True)] if len(spaces) > 1 else []

    def _unite(self, spaces: Sequence[tuple[int, int]]) -> None:
        known = {self._joint[each] for each in spaces if each in self._joint}
        joint = min(known, default=len(self._joint))
        self._joint |= dict.fromkeys((*spaces, *(key for key, each in self._joint.items() if each in known)), joint)

    def _is_twisted(self, joint: int) -> bool:
        tasks = [t for t, _ in self.members_of(joint)]
        return len(set(tasks)) < len(tasks)

    def _read(self, task: int, columns: np.ndarray | None) -> set[int]:
        if columns is None:
            return set()
        spaces = np.unique(self._members[task].structure.space_of(columns))
        return {self._joint[task, space] for space in spaces.tolist() if (task, space) in self._joint}


def alike(layers: Mapping[int, Layer]) -> dict[int, Layer]:
    """The layers of a joint layer that can have weights in common: those of the kind and kernel that most have."""
    able = {t: layer for t, layer in layers.items() if not layer.pinned}
    forms = [layer.form for layer in able.values()]
    return {t: layer for t, layer in able.items() if layer.form == max(forms, key=forms.count)}


def of_one_kind(layers: Mapping[int, Layer]) -> dict[int, Layer]:
    """Those with a bias, or those without one: whichever are more."""
    biased = [layer.bias is not None for layer in layers.values()]
    most = 2 * sum(biased) >= len(biased)
    return {t: layer for t, layer in layers.items() if (layer.bias is not None) == most}
