"""One order for every residual stream, before anything is merged.

Several layers write into a stream, and all need the same order of its units, or its channels must be permuted before
and after every addition (Sec. 3.7). The order is chosen by the mean functional
difference (eq. 12) of all of them. What they read depends on other orders in turn, so the networks are walked through
from first to last layer, with the orders found so far, until the orders of the streams stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from taskzip.algebra import Matching, functional_difference
from taskzip.planning import Quota
from taskzip.zipping.alignment import align_inputs
from taskzip.zipping.correspondence import JointLayers
from taskzip.zipping.meeting import TaskLayer
from taskzip.zipping.members import Member, Slots
from taskzip.zipping.slots import assign_slots
from taskzip.zipping.spaces import JointSpaces, Part
from taskzip.zipping.starts import unlikeness
from taskzip.zipping.wholes import partners, searched

_WALKS = 5
"""At most so many walks through the networks; most settle after two or three."""

Quotas = Callable[[JointLayers, Part], Quota]
"""How much of a part of a joint layer may share its weights."""

Sides = Mapping[str, TaskLayer]
"""The layers of one task by name."""


def stream_slots(
    members: Sequence[Member],
    layers: Sequence[JointLayers],
    spaces: JointSpaces,
    coupled: Collection[int],
    sides: Sequence[Sides],
    *,
    quota: Quotas,
    matching: Matching,
    seed: int,
) -> list[Slots]:
    """In which slot each unit of the coupled joint spaces stands.

    Args:
        members: the tasks; nothing of them is zipped yet.
        layers: the joint layers.
        spaces: their joint spaces.
        coupled: the joint spaces to put into order.
        sides: per task, the weights and curvatures of its original layers.
        quota: how much of a part of a joint layer shares weights.
        matching, seed: how units find their partners.

    Returns:
        Per task, per space, the slots of its units; spaces that are not coupled are left out.
    """
    slots: list[Slots] = [{} for _ in members]
    for task, member in enumerate(members):
        walk = _Walk(members, layers, spaces, sides, slots, task, quota, matching, seed)
        for joint in spaces.read_first & set(coupled):
            walk.begin(joint)
        for _ in range(_WALKS):
            before = {space: slots[task].get(space) for space in range(len(member.structure.spaces))}
            walk.through(coupled)
            if all(_same(before[space], found) for space, found in slots[task].items() if found[0] in coupled):
                break
    return [{space: found for space, found in each.items() if found[0] in coupled} for each in slots]


class _Walk:
    """Finds the slots of one task, while those of the tasks before it are settled."""

    def __init__(
        self,
        members: Sequence[Member],
        layers: Sequence[JointLayers],
        spaces: JointSpaces,
        sides: Sequence[Sides],
        slots: list[Slots],
        task: int,
        quota: Quotas,
        matching: Matching,
        seed: int,
    ) -> None:
        self._quota = quota
        self._members, self._layers, self._spaces, self._sides = members, layers, spaces, sides
        self._slots, self._task, self._matching, self._seed = slots, task, matching, seed

    def begin(self, joint: int) -> None:
        """Somewhere to begin with a space that layers read before any writes it."""
        spaces = [(t, space) for t, space in self._spaces.members_of(joint) if t <= self._task]
        for space in [space for t, space in spaces if t == self._task]:
            units = len(self._members[self._task].structure.spaces[space].units)
            cost = _Costs.none(self._count(joint), units, Quota(units))
            for t, settled in [each for each in spaces if each[0] < self._task]:
                d = unlikeness(self._members[t], settled, self._members[self._task], space)
                if d is not None:
                    cost.add(self._slots[t][settled][1], d)
            self._settle(space, joint, cost)

    def through(self, coupled: Collection[int]) -> None:
        """One walk: spaces of one layer follow at once; streams while they are new, and then again at the end."""
        known = set(self._slots[self._task])
        costs: dict[int, tuple[int, _Costs]] = {}
        for layer in self._layers:
            for part in self._spaces.parts(layer) if self._task in layer else []:
                if self._task not in part.rows:
                    continue
                space = part.spaces[self._task]
                cost = self._cost(layer, part)
                if part.joint in coupled and space in costs:
                    cost = cost + costs[space][1]
                costs[space] = (part.joint, cost)
                if part.joint not in coupled or space not in known:
                    self._settle(space, part.joint, cost)
        for space, (joint, cost) in costs.items():
            if joint in coupled:
                self._settle(space, joint, cost)

    def _settle(self, space: int, joint: int, cost: _Costs) -> None:
        mean = cost.mean()
        if np.isfinite(mean).any():
            slots, count, within = np.arange(len(mean)), len(mean), self._within(space, joint, mean)
            method, seed = self._matching, self._seed
            slots = assign_slots(mean, slots, count, cost.quota, method=method, seed=seed, within=within)
        else:  # somewhere to begin: other layers may tell more in the next walk
            slots = np.arange(mean.shape[1])
        self._slots[self._task][space] = (joint, slots)

    def _within(self, space: int, joint: int, cost: np.ndarray) -> np.ndarray | None:
        """Where slots and units of a space are in wholes that belong together, [slots, units]."""
        wholes = self._spaces.wholes(joint)
        if wholes is None:
            return None
        slots = np.full(len(cost), -1)
        for t, other in self._spaces.members_of(joint):
            if t < self._task:
                place, found = self._slots[t][other][1], np.empty(1 + wholes[t].max(), np.int64)
                for whole in range(len(found)):
                    known = slots[place[wholes[t] == whole]].max()
                    found[whole] = whole if known < 0 else known
                slots[place] = found[wholes[t]]
        known, _ = searched(cost, self._matching, self._seed)
        own = wholes[self._task]
        return np.equal.outer(slots, partners(known, slots, own)[own])

    def _cost(self, layer: JointLayers, part: Part) -> _Costs:
        """The difference to the units of earlier tasks in each slot of the joint space."""
        task = self._task
        quota = part.quotas(self._quota(layer, part)).get(task, Quota(0))
        cost = _Costs.none(self._count(part.joint), len(part.rows[task]), quota)
        for t in [t for t in part.rows if t < task]:
            pair = {t: layer[t], task: layer[task]}
            common = align_inputs(self._members, pair, dict(enumerate(self._slots))).common([t], task)
            if common.channels:
                sides = [self._sides[each][layer[each].name] for each in pair]
                d = functional_difference(
                    *(side.common(common, torch.from_numpy(part.rows[side.task].ravel())) for side in sides),
                    *(side.curvature(common) for side in sides),
                    rows=part.rows[task].shape[1],
                )
                d = d if quota.threshold is None else d.clamp_max(quota.threshold)
                cost.add(self._slots[t][part.spaces[t]][1], d.cpu().numpy())
        return cost

    def _count(self, joint: int) -> int:
        """How many slots of a joint space earlier tasks fill."""
        earlier = (found for t in range(self._task) for found in self._slots[t].values())
        return max((1 + int(slots.max()) for each, slots in earlier if each == joint), default=0)


@dataclass(frozen=True)
class _Costs:
    """Summed differences between slots and units.

    Attributes:
        total: [slots, units].
        times: [slots, 1], of how many differences; where of none, slot and units have nothing in common.
        quota: what the layers may share of these units.
    """

    total: np.ndarray
    times: np.ndarray
    quota: Quota

    @classmethod
    def none(cls, slots: int, units: int, quota: Quota) -> _Costs:
        """Before anything is known."""
        return cls(np.zeros((slots, units)), np.zeros((slots, 1)), quota)

    def add(self, slots: np.ndarray, difference: np.ndarray) -> None:
        """Add what the units in some slots, each in its own, cost: [slots, units]."""
        self.total[slots] += difference
        self.times[slots] += 1

    def __add__(self, other: _Costs) -> _Costs:
        """Of two layers; the larger quota counts."""
        quota = max(self.quota, other.quota, key=lambda quota: quota.pairs)
        limits = [q.threshold for q in (self.quota, other.quota)]
        threshold = None if None in limits else max(limit for limit in limits if limit is not None)
        return _Costs(self.total + other.total, self.times + other.times, Quota(quota.pairs, threshold))

    def mean(self) -> np.ndarray:
        """The mean difference, so that a slot with units of few tasks is not the nearest for that."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.times > 0, self.total / self.times, np.inf)


def _same(before: tuple[int, np.ndarray] | None, after: tuple[int, np.ndarray]) -> bool:
    return before is not None and np.array_equal(before[1], after[1])
