"""From merged weights to blocks: how the weights of one layer are cut up and tied (design 2.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from taskzip.zipped import Blocks, BlockSpec, BlocksSpec, RowSpec, block_name, install, scale_name
from taskzip.zipping.alignment import JointInputs
from taskzip.zipping.members import Member, Owners

Groups = Mapping[Owners, np.ndarray]
"""Which rows of a layer each set of owners shares, in an order that all of them have in common."""


def install_blocks(
    members: Sequence[Member],
    inputs: JointInputs,
    groups: Mapping[int, Groups],
    scales: Mapping[int, Tensor] | None = None,
) -> None:
    """Replace the dense weights of a layer by blocks, one Parameter for all tasks that use it.

    Args:
        members: the tasks; their weights are merged already, with equal values wherever they are shared.
        inputs: the inputs of the layer that several tasks share.
        groups: per task that takes part, the rows that it shares; all others are its own.
        scales: per task, by what it multiplies each row; the biases are its own then. None where all is shared.
    """
    cutter = _Cutter(members, inputs, groups, scales or {})
    cut = {t: (cutter.weight(t), cutter.bias(t)) for t in inputs.layers}
    for t, layer in inputs.layers.items():
        for name, blocks in zip((layer.weight, layer.bias), cut[t], strict=True):
            if name is not None and blocks is not None:
                install(members[t].network, name, blocks)


class _Cutter:
    """Cuts dense weights into blocks, and hands out the same Parameter to every task that uses one."""

    def __init__(
        self,
        members: Sequence[Member],
        inputs: JointInputs,
        groups: Mapping[int, Groups],
        scales: Mapping[int, Tensor],
    ) -> None:
        self._names = [(member.number, member.task.name) for member in members]
        self._inputs = inputs
        self._rows = {t: _with_own(each, (t,), inputs.layers[t].units) for t, each in groups.items()}
        self._weights = {t: members[t].network.get_parameter(x.weight) for t, x in inputs.layers.items()}
        self._biases = {t: members[t].network.get_parameter(x.bias) for t, x in inputs.layers.items() if x.bias}
        self._scales = scales
        self._tied: dict[tuple[str, bool], nn.Parameter] = {}

    def weight(self, task: int) -> Blocks:
        """The weight of one task: for each group of rows, a block per set of tasks that use the same inputs."""
        rows: list[RowSpec] = []
        parameters: dict[str, nn.Parameter] = {}
        for owners in self._rows[task]:
            specs, order = [], []
            for users, channels in self._channels(task, owners).items():
                name, block = self._weight_block(owners, users)
                parameters[name] = block
                inputs = len(channels) if len(channels) < block.shape[1] else None
                specs.append(BlockSpec(name, tuple(block.shape), inputs))
                order.append(channels)
            absent = np.setdiff1d(np.arange(self._inputs.layers[task].inputs), np.concatenate(order))
            scale = self._scale(task, owners, parameters)
            rows.append(RowSpec(tuple(specs), _natural(np.concatenate([*order, absent])), len(absent), scale))
        return Blocks(BlocksSpec(tuple(rows), self._order(task), self._apart(rows)), parameters)

    def bias(self, task: int) -> Blocks | None:
        """The bias of one task: a block per group of rows, shared by those of its owners that have a bias.

        None where there is none, or where all of it is the task's own.
        """
        if task not in self._biases or task in self._scales:
            return None
        parameters: dict[str, nn.Parameter] = {}
        for owners, rows in self._rows[task].items():
            users = tuple(t for t in owners if t in self._inputs.bias)
            values = self._biases[task][torch.from_numpy(rows)]
            parameters[self._name(owners, users)] = self._tie(owners, users, values, bias=True)
        specs = tuple(RowSpec((BlockSpec(name, tuple(p.shape)),)) for name, p in parameters.items())
        return Blocks(BlocksSpec(specs, self._order(task), self._apart(specs)), parameters)

    def _scale(self, task: int, owners: Owners, parameters: dict[str, nn.Parameter]) -> str | None:
        """What a task multiplies the rows of a group by, added to the parameters; None where the rows are its own."""
        if task not in self._scales or len(owners) == 1:
            return None
        name = scale_name([each for _, each in sorted(self._names[t] for t in owners)], self._names[task][1])
        weight, rows = self._weights[task], torch.from_numpy(self._rows[task][owners])
        parameters[name] = nn.Parameter(self._scales[task][rows].to(weight), weight.requires_grad)
        return name

    def _apart(self, rows: Sequence[RowSpec]) -> bool:
        """Whether groups of rows are computed one by one: where some lack inputs, and where they can be common."""
        return not self._inputs.cross and (len(rows) > 1 or any(row.absent for row in rows))

    def _order(self, task: int) -> tuple[int, ...] | None:
        return _natural(np.concatenate(list(self._rows[task].values())))

    def _channels(self, task: int, owners: Owners) -> dict[Owners, np.ndarray]:
        """A task's input channels by the owners of the rows that also have them."""
        found: dict[Owners, list[np.ndarray]] = {}
        if len(owners) > 1:
            for segment in self._inputs.read_by(owners, task):
                users = tuple(t for t in owners if t in segment.owners)
                found.setdefault(users, []).append(segment.channels[task])
            if not self._inputs.cross:
                return {users: np.concatenate(each) for users, each in found.items()}
        everything = np.arange(self._inputs.layers[task].inputs)
        left = np.setdiff1d(everything, np.concatenate([everything[:0], *(c for each in found.values() for c in each)]))
        if len(left):
            found.setdefault((task,), []).append(left)
        return {users: np.concatenate(each) for users, each in found.items()}

    def _weight_block(self, owners: Owners, users: Owners) -> tuple[str, nn.Parameter]:
        channels = {t: self._channels(t, owners)[users] for t in users}
        widest = max(users, key=lambda t: len(channels[t]))
        rows = torch.from_numpy(self._rows[widest][owners])
        values = self._weights[widest][rows][:, torch.from_numpy(channels[widest])]
        return self._name(owners, users), self._tie(owners, users, values, bias=False)

    def _tie(self, owners: Owners, users: Owners, values: Tensor, *, bias: bool) -> nn.Parameter:
        key = (self._name(owners, users), bias)
        if key not in self._tied:
            trained = any((self._biases if bias else self._weights)[t].requires_grad for t in users)
            block = values.detach().clone(memory_format=torch.contiguous_format)
            self._tied[key] = nn.Parameter(block, requires_grad=trained)
        return self._tied[key]

    def _name(self, owners: Owners, users: Owners) -> str:
        return block_name(*([name for _, name in sorted(self._names[t] for t in each)] for each in (owners, users)))


def _with_own(groups: Groups, own: Owners, units: int) -> dict[Owners, np.ndarray]:
    """The groups with most owners first, and what no group has."""
    shared = dict(sorted(groups.items(), key=lambda group: (-len(group[0]), group[0])))
    left = np.setdiff1d(np.arange(units), np.concatenate([np.empty(0, np.int64), *shared.values()]))
    return shared | ({own: left} if len(left) else {})


def _natural(places: np.ndarray) -> tuple[int, ...] | None:
    """How to put rows or columns that lie as `places` into ascending order; None where they are."""
    order = np.argsort(places)
    return None if (order == np.arange(len(order))).all() else tuple(order.tolist())
