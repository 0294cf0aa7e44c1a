"""One layer of several tasks becomes one: units are paired and their weights merged, one task after another.

The heart of Algorithm 1, for any number of tasks (Sec. 3.4): the first task's units are the joint layer to begin with;
each further task's units pair with units of any group, at the curvature that the group has gathered so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from taskzip.algebra import (
    Connections,
    Matching,
    Moments,
    Pairs,
    check_merging,
    check_pairing,
    match,
    match_spread,
    some,
    spread_is_better,
    support,
)
from taskzip.planning import Quota
from taskzip.zipping.alignment import CommonInputs, JointInputs
from taskzip.zipping.meeting import Meeting, TaskLayer
from taskzip.zipping.members import Owners
from taskzip.zipping.slots import assign_slots, pair_in_slots
from taskzip.zipping.wholes import match_within, partners, searched


@dataclass(frozen=True)
class Group:
    """Joint units that the same tasks own.

    Attributes:
        units: [units, owners], the number of each unit in each of its owners.
        slots: [units], where the units stand in their joint space.
    """

    units: Tensor
    slots: np.ndarray

    def taken(self, keep: Tensor) -> Group:
        """Some of the units."""
        return Group(self.units[keep], self.slots[keep.cpu().numpy()])


@dataclass(frozen=True)
class Pairing:
    """How units find their partners.

    Attributes:
        quotas: per task that is added, how many pairs share their weights.
        matching, seed: how pairs are found.
        aligned: every unit gets a partner, whether they share weights or not (Sec. 3.7).
        connections: which ones a merged unit has.
        importance: per task, how much each unit matters to what reads it; a pair counts by the mean of its units'.
    """

    quotas: Mapping[int, Quota]
    matching: Matching
    seed: int
    aligned: bool
    connections: Connections
    importance: Mapping[int, np.ndarray]


class JointLayer:
    """The joint layer, or that part of it whose units lie in one joint space, while it grows.

    Each task's weights stay a full matrix [rows, inputs * taps + 1], bias last; what is shared stands in every one.

    Attributes:
        groups: per set of owners, their units.
        slots: per task, in which slot each of its units stands.
        weights: per task, its weights as merged so far.
        costs: per task that was added, the functional difference of each of its pairs.
    """

    def __init__(
        self,
        sides: Mapping[int, TaskLayer],
        inputs: JointInputs,
        rows: Mapping[int, np.ndarray],
        pairing: Pairing,
        slots: Mapping[int, np.ndarray] | None = None,
        common: Mapping[int, np.ndarray] | None = None,
        wholes: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        """The first task's units alone.

        Args:
            sides: the layer of each task.
            inputs: what they read in common.
            rows: per task that takes part, the rows of each unit, [units, rows of a unit].
            pairing: how units find their partners.
            slots: per task, where the units stand; None where this layer decides.
            common: per task, labels of its units; those of equal labels share their weights before all others.
            wholes: per task, the whole to which each of its units belongs, equally many of them; None where not all
                tasks have such.
        """
        self.costs: list[Tensor] = []
        self._sides = sides
        self._inputs = inputs
        self._rows = {t: torch.from_numpy(each).to(sides[t].weights.device) for t, each in rows.items()}
        self._pairing = pairing
        self._given = slots
        self._common = common
        self._wholes = None if wholes is None else dict(wholes)
        self.weights = {t: sides[t].weights for t in rows}
        first, *self._others = rows
        self.slots = {first: np.arange(len(rows[first])) if slots is None else slots[first]}
        self.groups: dict[Owners, Group] = {(first,): Group(self._all_units(first), self.slots[first])}
        for task in self._others:
            self._add(task)

    @property
    def cost(self) -> float:
        """The summed functional difference of all pairs."""
        return sum(float(each.sum()) for each in self.costs)

    def energy(self) -> float:
        """What d would be if the pre-activations were lost: half their variance, summed over rows and tasks."""
        total = 0.0
        for t, rows in self._rows.items():
            side = self._sides[t]
            variance = side.statistics.moments(side.weights[rows.flatten()])[1]
            total += side.balance / side.samples * side.statistics.rows * float(variance.sum()) / 2
        return total

    def match_spread(self) -> None:
        """Give merged units back the spread that the original networks had; batch-norm does that by itself."""
        if any(side.layer.batch_norm for side in self._sides.values()):
            return
        for owners, units in self._shared():
            rows = [self._rows_of(t, units[:, k]) for k, t in enumerate(owners)]
            weights = [self.weights[t][each] for t, each in zip(owners, rows, strict=True)]
            balance = [self._sides[t].balance for t in owners]
            scale, shift = match_spread(
                [self._sides[t].statistics for t in owners], weights, rows, [b / sum(balance) for b in balance]
            )
            shift = shift if set(owners) <= set(self._inputs.bias) else torch.zeros_like(shift)
            scaled = [scale[:, None] * w for w in weights]
            for w in scaled:
                w[:, -1] += shift
            better = self._better_spread(owners, rows, weights, scaled, scale)
            for t, each, before, after in zip(owners, rows, weights, scaled, strict=True):
                self.weights[t] = self.weights[t].index_copy(0, each, torch.where(better[:, None], after, before))

    def write(self, weights: Mapping[int, Tensor]) -> None:
        """Put what is shared into the tasks' weights, given as they were before."""
        for owners, units in self._shared():
            for k, t in enumerate(owners):
                rows = self._rows_of(t, units[:, k])
                weights[t][rows] = self.weights[t][rows]

    def reorder(self, task: int, order: np.ndarray) -> None:
        """A task's units were put into a new order: unit `order[k]` now stands in place k."""
        place = torch.from_numpy(np.argsort(order)).to(self.weights[task].device)
        for owners, group in self.groups.items():
            if task in owners:
                group.units[:, owners.index(task)] = place[group.units[:, owners.index(task)]]
        self.slots[task] = self.slots[task][order]

    def units_of(self, task: int) -> dict[Owners, Tensor]:
        """The groups that own units of a task, and which these are."""
        return {owners: group.units[:, owners.index(task)] for owners, group in self.groups.items() if task in owners}

    def shared_rows(self) -> int:
        """How many rows of the joint layer more than one task owns."""
        return sum(len(units) * self._rows[owners[0]].shape[1] for owners, units in self._shared())

    def _add(self, task: int) -> None:
        """Pair the units of one more task with joint units, and merge the weights of the pairs."""
        candidates = [(owners, self._inputs.common(owners, task)) for owners in self.groups]
        meetings = [self._meeting(owners, task, common) for owners, common in candidates if common.channels]
        slots = np.concatenate([np.empty(0, np.int64), *(self.groups[m.owners].slots for m in meetings)])
        none = self.weights[task].new_zeros(0, len(self._rows[task]))
        importance = [self._importance(task, meeting) for meeting in meetings]
        worth = torch.cat([none, *(torch.outer(*each) for each in importance)])
        difference = worth * torch.cat([none, *(meeting.difference for meeting in meetings)])
        pairs = self._pair(task, meetings, slots, difference)
        pairs = pairs._replace(cost=pairs.cost / worth[pairs.a, pairs.b])
        self.costs.append(pairs.cost)
        start = 0
        for meeting, (of_joint, of_new) in zip(meetings, importance, strict=True):
            inside = (pairs.a >= start) & (pairs.a < start + meeting.units)
            joint, new = pairs.a[inside] - start, pairs.b[inside]
            self._merge(meeting, joint, new, pairs.cost[inside], (of_joint[joint], of_new[new]))
            start += meeting.units
        free = _without(self._all_units(task), pairs.b)
        if len(free):
            self.groups[task,] = Group(free, self.slots[task][free[:, 0].cpu().numpy()])

    def _pair(self, task: int, meetings: Sequence[Meeting], slots: np.ndarray, d: Tensor) -> Pairs:
        """Which joint units the units of a task share weights with; settles in which slots the task's units stand.

        `d` are the differences that count, [joint, new].
        """
        cost, count = d.double().cpu().numpy(), 1 + max(int(each.max()) for each in self.slots.values())
        pairing, quota = self._pairing, self._pairing.quotas[task]
        within = self._within(task, meetings) if self._given is None else None
        if self._given is None and not pairing.aligned:
            most = min(quota.pairs, *d.shape)
            if within is None:
                pairs = match(d, count=most, threshold=quota.threshold, method=pairing.matching, seed=pairing.seed)
                if pairing.matching == "optimal" and quota.threshold is None:
                    check_pairing(f"layer {self._sides[task].layer.name!r}", d, pairs.cost)
            else:
                pairs = match_within(cost, within, quota, method=pairing.matching, seed=pairing.seed)
                pairs = Pairs(*(each.to(d.device) for each in pairs))
            self.slots[task] = count + np.arange(d.shape[1])
            self.slots[task][pairs.b.cpu().numpy()] = slots[pairs.a.cpu().numpy()]
            return pairs
        method, seed = pairing.matching, pairing.seed
        self.slots[task] = (
            assign_slots(cost, slots, count, quota, method=method, seed=seed, within=within)
            if self._given is None
            else self._given[task]
        )
        pairs = pair_in_slots(
            cost,
            slots,
            self.slots[task],
            count=quota.pairs,
            threshold=quota.threshold,
            method=method,
            seed=seed,
            first=self._alike(task, meetings),
        )
        return Pairs(*(each.to(self.weights[task].device) for each in pairs))

    def _importance(self, task: int, meeting: Meeting) -> tuple[Tensor, Tensor]:
        """How much joint and new units matter; where a threshold decides, all alike.

        The curvature of a joint unit is the sum of its owners', who count by their mean square.
        """
        known = self._pairing.importance
        joint = torch.ones(meeting.units, dtype=torch.float64)
        new = torch.ones(len(self._rows[task]), dtype=torch.float64)
        if self._pairing.quotas[task].threshold is None and all(t in known for t in (*meeting.owners, task)):
            units = self.groups[meeting.owners].units.cpu().numpy()
            each = [known[t][units[:, k]] for k, t in enumerate(meeting.owners)]
            joint, new = torch.from_numpy(np.mean(np.square(each), axis=0) ** 0.5), torch.from_numpy(known[task])
        device = meeting.difference.device
        return joint.to(device), new.to(device)

    def _within(self, task: int, meetings: Sequence[Meeting]) -> np.ndarray | None:
        """Where joint units and units of a task are in wholes that belong together, [joint, new]."""
        if self._wholes is None or not meetings:
            return None
        cost = torch.cat([meeting.difference for meeting in meetings]).double().cpu().numpy()
        groups = [(m.owners[0], self.groups[m.owners].units[:, 0].cpu().numpy()) for m in meetings]
        joint = np.concatenate([self._wholes[t][units] for t, units in groups])
        known, _ = searched(cost, self._pairing.matching, self._pairing.seed)
        self._wholes[task] = partners(known, joint, self._wholes[task])[self._wholes[task]]
        return np.equal.outer(joint, self._wholes[task])

    def _alike(self, task: int, meetings: Sequence[Meeting]) -> np.ndarray | None:
        """Which joint units were common with which units of a task before, [joint, new]."""
        if self._common is None:
            return None
        found = [np.empty((0, len(self._rows[task])), bool)]
        for meeting in meetings:
            units = self.groups[meeting.owners].units.cpu().numpy()
            labels = [self._common[t][units[:, k]] for k, t in enumerate(meeting.owners)]
            found.append(np.all([each[:, None] == self._common[task] for each in labels], axis=0))
        return np.concatenate(found)

    def _meeting(self, owners: Owners, task: int, common: CommonInputs) -> Meeting:
        """The units of a group and those of a new task, as they are now."""
        units = self.groups[owners].units
        rows = {t: self._rows_of(t, units[:, k]) for k, t in enumerate(owners)}
        rows[task] = self._rows[task].flatten()
        height = self._rows[task].shape[1]
        return Meeting(self._sides, owners, task, common, lambda t: self.weights[t][rows[t]], height)

    def _merge(
        self, meeting: Meeting, joint: Tensor, new: Tensor, cost: Tensor, importance: tuple[Tensor, Tensor]
    ) -> None:
        if not len(joint):
            return
        merged = meeting.merged(joint, new, self._pairing.connections, importance)
        group = self.groups.pop(meeting.owners)
        owners = (*meeting.owners, meeting.task)
        units = torch.cat([group.units[joint], new[:, None]], dim=1)
        present = {t: self.weights[t][self._rows_of(t, units[:, k])] for k, t in enumerate(owners)}
        after = {t: meeting.written(t, before, merged) for t, before in present.items()}
        if not any(self._sides[t].pruned and support(rows, bias=True) is not None for t, rows in present.items()):
            self._check_merging(present, after, cost, importance)  # d does not know of missing connections
        for k, t in enumerate(owners):
            self.weights[t] = self.weights[t].index_copy(0, self._rows_of(t, units[:, k]), after[t])
        left = _without(torch.arange(len(group.units), device=joint.device), joint)
        if len(left):
            self.groups[meeting.owners] = group.taken(left)
        self.groups[owners] = Group(units, group.slots[joint.cpu().numpy()])

    def _check_merging(
        self,
        present: Mapping[int, Tensor],
        after: Mapping[int, Tensor],
        cost: Tensor,
        importance: tuple[Tensor, Tensor],
    ) -> None:
        sides = [self._sides[t] for t in present]
        joint, new = (each.square() / torch.maximum(*importance).square() for each in importance)
        check_merging(
            f"layer {sides[-1].layer.name!r}",
            [side.statistics for side in sides],
            [side.balance / side.samples for side in sides],
            [after[t] - before for t, before in present.items()],
            list(present.values()),
            cost,
            counts=[*(joint for _ in sides[1:]), new],
            centred=[side.centred for side in sides],
        )

    def _better_spread(
        self,
        owners: Owners,
        rows: Sequence[Tensor],
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        scale: Tensor,
    ) -> Tensor:
        """Which merged units come nearer to their original moments; to their variance alone where no bias can shift."""
        sides = [self._sides[t] for t in owners]
        units = some(len(scale), before[0].shape[1], scale.device)
        shifted = float(set(owners) <= set(self._inputs.bias))

        def moments(of: Sequence[Moments]) -> list[Moments]:
            return [(shifted * mean, variance) for mean, variance in of]

        answers = [side.statistics.answer_moments() for side in sides]
        wanted = moments([(m[chosen[units]], v[chosen[units]]) for (m, v), chosen in zip(answers, rows, strict=True)])
        was, now = (
            moments([side.statistics.moments(w[units]) for side, w in zip(sides, weights, strict=True)])
            for weights in (before, after)
        )
        balance = [side.balance / sum(each.balance for each in sides) for side in sides]
        better = torch.ones_like(scale, dtype=torch.bool)
        better[units] = spread_is_better(f"layer {sides[-1].layer.name!r}", wanted, was, now, balance)
        return better

    def _shared(self) -> list[tuple[Owners, Tensor]]:
        return [(owners, group.units) for owners, group in self.groups.items() if len(owners) > 1]

    def _all_units(self, task: int) -> Tensor:
        return torch.arange(len(self._rows[task]), device=self.weights[task].device)[:, None]

    def _rows_of(self, task: int, units: Tensor) -> Tensor:
        return self._rows[task][units].flatten()


def _without(units: Tensor, taken: Tensor) -> Tensor:
    """The entries at all places but those taken."""
    keep = torch.ones(len(units), dtype=torch.bool, device=units.device)
    keep[taken] = False
    return units[keep]
