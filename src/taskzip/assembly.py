"""From merged weights to blocks: how the weights of one layer are cut up and tied (design 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from taskzip.graph import Layer
from taskzip.members import Member
from taskzip.zipped.blocks import Blocks, BlockSpec, BlocksSpec, RowSpec, block_name, install


@dataclass(frozen=True)
class SharedInputs:
    """The inputs of one layer that all tasks share, aligned.

    Attributes:
        channels: per task, its input channels (columns of a linear layer) in the common order. Where the networks' own
            inputs differ in size, the smaller one has only the first of them; the rest are fictive connections of
            weight 0.
        bias: whether every task has a bias here.
    """

    channels: tuple[np.ndarray, ...]
    bias: bool

    @property
    def size(self) -> int:
        """How many channels the shared block has."""
        return max(len(c) for c in self.channels)

    def columns(self, task: int, layer: Layer) -> Tensor:
        """The columns of the weight matrix [units, inputs * taps + 1] that the task shares; the bias comes last."""
        taps = np.arange(layer.taps)
        columns = (self.channels[task][:, None] * layer.taps + taps).ravel()
        return torch.from_numpy(np.append(columns, layer.inputs * layer.taps) if self.bias else columns)

    def with_fictive(self, matrix: Tensor, layer: Layer, dims: Sequence[int]) -> Tensor:
        """A task's shared part with zeros for the fictive connections, put in before the bias, along the given dims."""
        width = self.size * layer.taps + self.bias
        for dim in dims:
            real = matrix.shape[dim] - self.bias
            gap = [width - matrix.shape[d] if d == dim else n for d, n in enumerate(matrix.shape)]
            if gap[dim]:
                head, bias = matrix.narrow(dim, 0, real), matrix.narrow(dim, real, int(self.bias))
                matrix = torch.cat([head, matrix.new_zeros(gap), bias], dim)
        return matrix

    def without_fictive(self, matrix: Tensor, task: int, layer: Layer) -> Tensor:
        """The columns of a common matrix that a task really has."""
        real = matrix[:, : len(self.channels[task]) * layer.taps]
        return torch.cat([real, matrix[:, -1:]], dim=1) if self.bias else real


def align_inputs(members: Sequence[Member], layers: Sequence[Layer]) -> SharedInputs:
    """Which inputs of a layer all tasks share: the network's input by position, hidden units by their pairs."""
    found = [member.shared_inputs(layer) for member, layer in zip(members, layers, strict=True)]
    names = [name for name in found[0] if all(name in each for each in found)]
    if names != [""]:  # a unit that is read 16 times by one task and 25 times by the other has no common columns
        names = [name for name in names if len({each[name].shape for each in found}) == 1]
    nothing = np.empty(0, np.int64)
    channels = tuple(np.concatenate([nothing, *(each[name].ravel() for name in names)]) for each in found)
    return SharedInputs(channels, bias=all(layer.bias is not None for layer in layers))


def install_blocks(
    members: Sequence[Member], layers: Sequence[Layer], inputs: SharedInputs, shared: int, merged: Tensor
) -> None:
    """Put a merged layer into every member's network: shared rows first, then the task's own.

    Args:
        members, layers: the tasks, and the layer in each of them; units already in their new order, shared ones first.
        inputs: the inputs that all tasks share.
        shared: how many units are shared.
        merged: their common weights, [shared, common columns (+ 1)], bias last if every task has one.
    """
    owners = [member.task.name for member in members]
    first = members[0].network.get_parameter(layers[0].weight)
    width = inputs.size * layers[0].taps
    common = _parameter(merged[:, :width].reshape(shared, inputs.size, *layers[0].kernel), first)
    common_bias = _parameter(merged[:, -1], first) if inputs.bias else None
    for task, (member, layer) in enumerate(zip(members, layers, strict=True)):
        name = member.task.name
        weight = member.network.get_parameter(layer.weight)
        channels = inputs.channels[task]
        private = np.setdiff1d(np.arange(layer.inputs), channels)
        parts = {block_name(owners, owners): common}
        if len(private):
            parts[block_name(owners, [name])] = _parameter(weight[:shared, torch.from_numpy(private)], weight)
        order = np.argsort(np.concatenate([channels, private]))
        natural = bool((order == np.arange(layer.inputs)).all())
        blocks = tuple(
            BlockSpec(n, tuple(p.shape), len(channels) if p is common and len(channels) < inputs.size else None)
            for n, p in parts.items()
        )
        rows = [RowSpec(blocks, None if natural else tuple(order.tolist()))]
        own = weight[shared:]
        _install(member, layer.weight, rows, parts, own)
        if layer.bias is not None:
            bias = member.network.get_parameter(layer.bias)
            if common_bias is not None:
                parts = {block_name(owners, owners): common_bias}
            else:
                parts = {block_name(owners, [name]): _parameter(bias[:shared], bias)}
            rows = [RowSpec(tuple(BlockSpec(n, tuple(p.shape)) for n, p in parts.items()))]
            _install(member, layer.bias, rows, parts, bias[shared:])


def _install(member: Member, parameter: str, rows: list[RowSpec], parts: dict[str, nn.Parameter], own: Tensor) -> None:
    if len(own):
        name = block_name([member.task.name], [member.task.name])
        parts = {**parts, name: _parameter(own, own)}
        rows = [*rows, RowSpec((BlockSpec(name, tuple(own.shape)),))]
    install(member.network, parameter, Blocks(BlocksSpec(tuple(rows)), parts))


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(
        values.detach().to(like).clone(memory_format=torch.contiguous_format),
        requires_grad=like.requires_grad,
    )
