"""One order for every residual stream, before anything is merged (Sec. 3.7).

Several layers write into a stream, and all need the same order of its units. It is chosen by the summed functional
difference (eq. 12) of all of them. What they read depends on other orders in turn, so the networks are walked through
from first to last layer, with the orders found so far, until the orders of the streams stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from taskzip.alignment import align_inputs
from taskzip.correspondence import JointLayers
from taskzip.difference import functional_difference
from taskzip.joining import TaskLayer
from taskzip.matching import Matching
from taskzip.members import Member, Slots
from taskzip.slots import assign_slots
from taskzip.spaces import JointSpaces, Part

_WALKS = 5
"""At most so many walks through the networks; most settle after two or three."""

Sides = Mapping[str, TaskLayer]
"""The layers of one task by name."""


def stream_slots(
    members: Sequence[Member],
    layers: Sequence[JointLayers],
    spaces: JointSpaces,
    coupled: Collection[int],
    sides: Sequence[Sides],
    *,
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
        matching, seed: how units find their partners.

    Returns:
        Per task, per space, the slots of its units; spaces that are not coupled are left out.
    """
    slots: list[Slots] = [{} for _ in members]
    for task, member in enumerate(members):
        walk = _Walk(members, layers, spaces, sides, slots, task, matching, seed)
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
        matching: Matching,
        seed: int,
    ) -> None:
        self._members, self._layers, self._spaces, self._sides = members, layers, spaces, sides
        self._slots, self._task, self._matching, self._seed = slots, task, matching, seed

    def through(self, coupled: Collection[int]) -> None:
        """One walk: spaces of one layer follow at once; streams while they are new, and then again at the end."""
        known = set(self._slots[self._task])
        costs: dict[int, tuple[int, np.ndarray]] = {}
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

    def _settle(self, space: int, joint: int, cost: np.ndarray) -> None:
        if len(cost):
            slots = assign_slots(cost, np.arange(len(cost)), len(cost), method=self._matching, seed=self._seed)
        else:
            slots = np.arange(len(self._members[self._task].structure.spaces[space].units))
        self._slots[self._task][space] = (joint, slots)

    def _cost(self, layer: JointLayers, part: Part) -> np.ndarray:
        """The summed difference to the units of earlier tasks in each slot of the joint space, [slots, units]."""
        task = self._task
        earlier = [t for t in part.rows if t < task]
        count = max((1 + int(slots.max()) for slots in self._settled(part.joint)), default=0)
        cost = np.zeros((count, len(part.rows[task])))
        for t in earlier:
            pair = {t: layer[t], task: layer[task]}
            inputs = align_inputs(self._members, pair, dict(enumerate(self._slots)))
            common = inputs.common(pair)
            if common.channels:
                sides = [self._sides[each][layer[each].name] for each in pair]
                d = functional_difference(
                    *(side.common(common, torch.from_numpy(part.rows[side.task].ravel())) for side in sides),
                    *(side.curvature(common) for side in sides),
                    rows=part.rows[task].shape[1],
                )
                cost[self._slots[t][part.spaces[t]][1]] += d.cpu().numpy()
        return cost

    def _settled(self, joint: int) -> list[np.ndarray]:
        return [slots for t in range(self._task) for each, slots in self._slots[t].values() if each == joint]


def _same(before: tuple[int, np.ndarray] | None, after: tuple[int, np.ndarray]) -> bool:
    return before is not None and np.array_equal(before[1], after[1])
