"""The joint units of one group and the units of a new task: over what they are compared, and what pairs become."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taskzip.algebra import (
    Connections,
    Factored,
    LayerStatistics,
    damped,
    denser,
    following,
    functional_difference,
    merge_weights,
    project,
    restricted,
    rise,
    schur_complement,
    support,
    united,
)
from taskzip.graph import Layer
from taskzip.zipping.alignment import CommonInputs
from taskzip.zipping.members import Owners


@dataclass(frozen=True)
class TaskLayer:
    """One task's layer as the joint layer sees it.

    Attributes:
        task: its number.
        layer: what the graph says of it.
        weights: all incoming weights [rows, inputs * taps + 1], bias last; divided by what batch-norm will divide each
            row by, or by its size where it has a scale of its own, so that the scale of a unit does not matter.
        statistics: what the layer reads.
        samples: over how many samples these were summed.
        balance: of its error, as for `zip`, relative to the variance of its answers.
        damping: as for `zip`.
        centred: whether every task takes the mean off its units again, by batch-norm or a shift of its own, so that
            only their spread matters.
        private: columns that no other task has and whose weights follow the shared ones; none if they stay.
        cross: whether shared units read more than what all of their owners have.
        pruned: whether weights that are 0 are missing connections.
    """

    task: int
    layer: Layer
    weights: Tensor
    statistics: LayerStatistics
    samples: int
    balance: float
    damping: float
    centred: bool
    private: Tensor
    cross: bool = True
    pruned: bool = True

    def curvature(self, common: CommonInputs) -> Tensor | Factored:
        """H over common inputs, weighted by the balance, damped, 0 where a connection is fictive."""
        h = self._curvature(common)
        if not self.cross:
            h = restricted(h, slice(0, len(common.columns(self.task))))
        elif len(self.private):
            h = schur_complement(h, len(h) - len(self.private))
        return common.curvature(self.task, h)

    def followed(self, common: CommonInputs, before: Tensor, after: Tensor) -> Tensor:
        """Rows of which the common weights were changed, with the private ones brought after them."""
        if not len(self.private):
            return after
        columns = common.columns(self.task).to(after.device)
        exists = support(before[:, self.private], bias=self._owns_bias()) if self.pruned else None
        change = following(self._curvature(common), after[:, columns] - before[:, columns], exists)
        return after.index_add(1, self.private, change)

    def common(self, common: CommonInputs, rows: Tensor) -> Tensor:
        """The weights of some rows over common inputs."""
        return common.weights(self.task, self.weights[rows])

    def cut(self, common: CommonInputs, weights: Tensor) -> Tensor:
        """The best common weights of rows that are to read nothing else, [rows, common width]."""
        kept = len(common.columns(self.task))
        found = project(self._curvature(common), weights[:, self._columns(common)], kept)
        return common.placed(self.task, found)

    def loss(self, common: CommonInputs, weights: Tensor, cut: Tensor) -> Tensor:
        """By how much the layer's error rises when rows get these common weights and no others, [rows]."""
        kept = cut[:, common.places(self.task).to(cut.device)]
        return rise(self._curvature(common), weights[:, self._columns(common)], kept)

    def _owns_bias(self) -> bool:
        return int(self.private[-1]) == self.weights.shape[1] - 1

    def _columns(self, common: CommonInputs) -> Tensor:
        """The task's own columns: first what is common, then what is private, or else what units lose."""
        columns = common.columns(self.task).to(self.weights.device)
        if self.cross:
            return torch.cat([columns, self.private])
        width = self.weights.shape[1] - (self.layer.bias is None)
        others = torch.ones(width, dtype=torch.bool, device=columns.device).index_fill_(0, columns, False)
        return torch.cat([columns, others.nonzero().flatten()])

    def _curvature(self, common: CommonInputs) -> Tensor | Factored:
        """The same over these columns."""
        s = self.statistics
        moments = s.rows * s.covariance() if self.centred else s.curvature
        return damped(self.balance / self.samples * restricted(moments, self._columns(common)), self.damping)


class Meeting:
    """The joint units of one group and the units of a new task, over the inputs that all of them share.

    Attributes:
        owners: the tasks of the group.
        task: the new one.
        difference: between joint and new units, the rise of the layer's error if the two were merged in the best way:
            d (eq. 12), and without `cross` what each of them loses with its other inputs.
    """

    def __init__(
        self,
        sides: Mapping[int, TaskLayer],
        owners: Owners,
        task: int,
        common: CommonInputs,
        weights: Callable[[int], Tensor],
        height: int,
    ) -> None:
        """Compare the units.

        Args:
            sides: the layer of each task.
            owners, task: who meets.
            common: the inputs that count.
            weights: gives an owner's weights of the group's rows as they are now, or those of the new task's rows.
            height: how many rows a unit has.
        """
        self.owners, self.task = owners, task
        self._sides, self._common, self._height = sides, common, height
        own = [sides[t].curvature(common) for t in owners]
        self._curvatures = (sum(own[1:], start=own[0]), sides[task].curvature(common))
        self._present = (self._gathered(weights), common.weights(task, weights(task)))
        if sides[task].cross:
            self._weights = self._present
            self.difference = functional_difference(*self._weights, *self._curvatures, rows=height)
        else:
            cut = [sides[t].cut(common, weights(t)) for t in owners]
            joint = cut[0] if len(cut) == 1 else merge_weights(cut, own)
            self._weights = (joint, sides[task].cut(common, weights(task)))
            lost = [sides[t].loss(common, weights(t), joint) for t in owners]
            others = sides[task].loss(common, weights(task), self._weights[1])
            self.difference = functional_difference(*self._weights, *self._curvatures, rows=height)
            self.difference += self._by_unit(torch.stack(lost).sum(0))[:, None] + self._by_unit(others)

    @property
    def units(self) -> int:
        """How many joint units there are."""
        return len(self._weights[0]) // self._height

    def merged(self, joint: Tensor, new: Tensor, connections: Connections, importance: Sequence[Tensor]) -> Tensor:
        """The common weights of pairs, [pairs * rows of a unit, common width].

        `importance` says how much the units of each side matter, [pairs].
        """
        weights, present = (self._taken(each, joint, new) for each in (self._weights, self._present))
        squares = [each.square().repeat_interleave(self._height) for each in importance]
        return merge_weights(weights, self._curvatures, self._exists(present, connections), squares)

    def written(self, task: int, before: Tensor, merged: Tensor) -> Tensor:
        """All weights of an owner's rows that get these common ones."""
        if not self._sides[task].cross:
            return self._common.write(task, torch.zeros_like(before), merged)
        return self._sides[task].followed(self._common, before, self._common.write(task, before, merged))

    def _gathered(self, weights: Callable[[int], Tensor]) -> Tensor:
        """The joint weights: what several owners have, all of them have alike."""
        first, *others = self.owners
        whole = self._common.weights(first, weights(first))
        for t in others:
            places, columns = (each.to(whole.device) for each in (self._common.places(t), self._common.columns(t)))
            whole = whole.index_copy(1, places, weights(t)[:, columns])
        return whole

    def _taken(self, weights: Sequence[Tensor], joint: Tensor, new: Tensor) -> list[Tensor]:
        """The rows of some of the joint and new units."""
        rows = [w.unflatten(0, (-1, self._height)) for w in weights]
        return [rows[0][joint].flatten(0, 1), rows[1][new].flatten(0, 1)]

    def _by_unit(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, self._height)).sum(1)

    def _exists(self, weights: Sequence[Tensor], connections: Connections) -> Tensor | None:
        """Which connections merged units have (Sec. 3.6)."""
        if not all(self._sides[t].pruned for t in (*self.owners, self.task)):
            return None
        one, other = (support(w, bias=self._common.bias) for w in weights)
        if one is None or other is None:
            return None
        # Where one of them has none, the other one decides.
        real = [self._common.real(self.owners).to(one.device), self._common.real([self.task]).to(one.device)]
        supports = [torch.where(real[0], one, other), torch.where(real[1], other, one)]
        return united(supports) if connections == "any" else denser(supports)
