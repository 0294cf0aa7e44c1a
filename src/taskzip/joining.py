"""One layer of several tasks becomes one: units are paired and their weights merged, one task after another.

The heart of Algorithm 1, for any number of tasks (Sec. 3.4): the first task's units are the joint layer to begin with;
each further task's units pair with units of any group, at the curvature that the group has gathered so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from taskzip.alignment import CommonInputs, JointInputs
from taskzip.curvature import LayerStatistics, damped
from taskzip.difference import functional_difference
from taskzip.factored import Factored, restricted
from taskzip.matching import Matching, match
from taskzip.members import Member, Owners
from taskzip.merging import merge_weights
from taskzip.plan import Quota
from taskzip.recalibration import match_spread


class JointLayer:
    """The joint layer while it grows.

    Each task's weights stay a full matrix [units, inputs * taps + 1], bias last; what is shared stands in every one.

    Attributes:
        groups: per set of owners, which units of each owner are one unit: [units of the group, owners].
        weights: per task, its weights as merged so far.
        cost: the summed functional difference of all pairs so far.
    """

    def __init__(
        self,
        members: Sequence[Member],
        inputs: JointInputs,
        statistics: Mapping[int, LayerStatistics],
        weights: Mapping[int, Tensor],
        balance: Sequence[float],
        damping: float,
    ) -> None:
        self.inputs = inputs
        self.cost = 0.0
        self._members = members
        self._statistics = statistics
        self._balance = balance
        self._damping = damping
        self._normed = all(layer.batch_norm for layer in inputs.layers.values())
        self.weights = {t: w / self._scale(t) for t, w in weights.items()}
        first = next(iter(inputs.layers))
        self.groups: dict[Owners, Tensor] = {(first,): self._all_units(first)}

    def add(self, task: int, quota: Quota, matching: Matching, seed: int) -> None:
        """Pair the units of one more task with joint units, and merge the weights of the pairs."""
        candidates = [(owners, self.inputs.common((*owners, task))) for owners in self.groups]
        candidates = [(owners, common) for owners, common in candidates if common.channels]
        free = self._all_units(task)
        if candidates:
            meetings = [_Meeting(self, owners, task, common) for owners, common in candidates]
            pairs = match(
                torch.cat([m.difference for m in meetings]),
                count=min(quota.pairs, sum(len(m.units) for m in meetings), len(free)),
                threshold=quota.threshold,
                method=matching,
                seed=seed,
            )
            self.cost += float(pairs.cost.sum())
            start = 0
            for meeting in meetings:
                inside = (pairs.a >= start) & (pairs.a < start + len(meeting.units))
                self._merge(meeting, pairs.a[inside] - start, pairs.b[inside])
                start += len(meeting.units)
            free = _without(free, pairs.b)
        if len(free):
            self.groups[task,] = free

    def match_spread(self) -> None:
        """Give merged units back the spread that the original networks had; batch-norm does that by itself."""
        if any(layer.batch_norm for layer in self.inputs.layers.values()):
            return
        for owners, units in self._shared():
            rows = [self.weights[t][units[:, k]] for k, t in enumerate(owners)]
            total = sum(self._balance[t] for t in owners)
            scale, shift = match_spread(
                [self._statistics[t] for t in owners], rows, list(units.T), [self._balance[t] / total for t in owners]
            )
            shift = shift if set(owners) <= set(self.inputs.bias) else torch.zeros_like(shift)
            for k, (t, w) in enumerate(zip(owners, rows, strict=True)):
                w = scale[:, None] * w
                w[:, -1] += shift
                self.weights[t] = self.weights[t].index_copy(0, units[:, k], w)

    def finished(self, weights: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Every task's weights: merged where shared, else as they were given."""
        found = {}
        for t, w in weights.items():
            shared = [units for owners, units in self.units_of(t).items() if len(owners) > 1]
            units = torch.cat([self._all_units(t)[:0, 0], *shared])
            found[t] = w.index_copy(0, units, self.weights[t][units])
        return found

    def units_of(self, task: int) -> dict[Owners, Tensor]:
        """The groups that own units of a task, and which these are."""
        return {owners: units[:, owners.index(task)] for owners, units in self.groups.items() if task in owners}

    def shared_units(self) -> int:
        """How many joint units more than one task owns."""
        return sum(len(units) for _, units in self._shared())

    def curvature(self, task: int, common: CommonInputs) -> Tensor | Factored:
        """H of one task over common inputs, weighted by the balance, damped, 0 where a connection is fictive."""
        s, layer = self._statistics[task], self.inputs.layers[task]
        # Batch-norm takes the mean off again, for each task by itself, so that only the spread matters.
        moments = s.rows * s.covariance() if layer.batch_norm else s.curvature
        columns = common.columns(task).to(self.weights[task].device)
        h = self._balance[task] / self._members[task].samples * restricted(moments, columns)
        return common.curvature(task, damped(h, self._damping))

    def _merge(self, meeting: _Meeting, joint: Tensor, new: Tensor) -> None:
        if not len(joint):
            return
        merged = meeting.merged(joint, new)
        owners = (*meeting.owners, meeting.task)
        units = torch.cat([meeting.units[joint], new[:, None]], dim=1)
        for k, t in enumerate(owners):
            rows = meeting.common.write(t, self.weights[t][units[:, k]], merged)
            self.weights[t] = self.weights[t].index_copy(0, units[:, k], rows)
        left = _without(torch.arange(len(meeting.units), device=joint.device), joint)
        del self.groups[meeting.owners]
        if len(left):
            self.groups[meeting.owners] = meeting.units[left]
        self.groups[owners] = units

    def _shared(self) -> list[tuple[Owners, Tensor]]:
        return [(owners, units) for owners, units in self.groups.items() if len(owners) > 1]

    def _all_units(self, task: int) -> Tensor:
        return torch.arange(self.inputs.layers[task].units, device=self.weights[task].device)[:, None]

    def _scale(self, task: int) -> Tensor | float:
        """What batch-norm will divide each unit by: the unit's own scale must not matter (design 2.4)."""
        return self._members[task].batch_norm_scale(self.inputs.layers[task])[:, None] if self._normed else 1.0


class _Meeting:
    """The joint units of one group and the units of a new task, over the inputs that all of them share."""

    def __init__(self, joint: JointLayer, owners: Owners, task: int, common: CommonInputs) -> None:
        self.owners, self.task, self.common = owners, task, common
        self.units = joint.groups[owners]
        own = [joint.curvature(t, common) for t in owners]
        self._curvatures = (sum(own[1:], start=own[0]), joint.curvature(task, common))
        widest = max(range(len(owners)), key=lambda k: len(common.columns(owners[k])))
        rows = joint.weights[owners[widest]][self.units[:, widest]]
        self._weights = (common.weights(owners[widest], rows), common.weights(task, joint.weights[task]))
        self.difference = functional_difference(*self._weights, *self._curvatures)

    def merged(self, joint: Tensor, new: Tensor) -> Tensor:
        """The common weights of pairs, [pairs, common width]."""
        return merge_weights([self._weights[0][joint], self._weights[1][new]], self._curvatures)


def _without(units: Tensor, taken: Tensor) -> Tensor:
    """The entries at all places but those taken."""
    keep = torch.ones(len(units), dtype=torch.bool, device=units.device)
    keep[taken] = False
    return units[keep]
