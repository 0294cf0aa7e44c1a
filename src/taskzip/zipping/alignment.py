"""Which inputs of a layer are the same for which tasks: the columns over which weights can be compared and shared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from taskzip.algebra import Factored
from taskzip.graph import Layer
from taskzip.zipping.members import Member, Owners, Slots


@dataclass(frozen=True)
class Segment:
    """Input channels that the same tasks share.

    Attributes:
        owners: these tasks.
        channels: per owner, its own channels (columns of a linear layer) in the common order. Where the networks' own
            inputs differ in size, a smaller one has only the first of them; the others are fictive connections of
            weight 0 (Sec. 3.4).
        source: the joint space in which these units lie; None where they are the networks' own input, below 0 where
            they are in a fixed order.
    """

    owners: Owners
    channels: Mapping[int, np.ndarray]
    source: int | None = None

    @property
    def size(self) -> int:
        """How many channels the largest of the owners has here."""
        return max(map(len, self.channels.values()))


@dataclass(frozen=True)
class JointInputs:
    """All inputs of one layer that more than one task reads.

    Attributes:
        layers: the layer in each task that takes part.
        segments: the shared input channels, by owners.
        bias: the tasks that have a bias here.
        cross: whether a unit also reads inputs that not all of its owners have.
    """

    layers: Mapping[int, Layer]
    segments: tuple[Segment, ...]
    bias: Owners
    cross: bool = True

    def private(self, task: int) -> Tensor:
        """The columns of a task's weight matrix that no other task has, the bias among them if that is so."""
        shared = [s.channels[task] for s in self.segments if task in s.owners]
        layer = self.layers[task]
        own = np.setdiff1d(np.arange(layer.inputs), np.concatenate([np.empty(0, np.int64), *shared]))
        return _columns(own, layer.taps, [layer.inputs * layer.taps] if self.bias == (task,) else [])

    def common(self, owners: Iterable[int], task: int) -> CommonInputs:
        """The inputs that a task shares with any of these owners; without `cross`, with all of them."""
        others = set(owners)
        segments = [s for s in self.segments if task in s.owners and self._met(others, s.owners)]
        shares_bias = task in self.bias and self._met(others, self.bias)
        return CommonInputs(self.layers, segments, self.bias if shares_bias else ())

    def read_by(self, owners: Owners, task: int) -> list[Segment]:
        """The segments of a task that a unit of several owners reads."""
        return [s for s in self.segments if task in s.owners and (self.cross or set(owners) <= set(s.owners))]

    def _met(self, others: set[int], owners: Owners) -> bool:
        return bool(others & set(owners)) if self.cross else others <= set(owners)


class CommonInputs:
    """The vector w~ of the paper: weights from inputs that certain tasks share, the bias last.

    A task has those segments that it owns; the others are fictive connections to it.
    """

    def __init__(self, layers: Mapping[int, Layer], segments: Sequence[Segment], bias: Owners) -> None:
        self._layers = layers
        self._segments = segments
        self._bias = bias
        self.taps = next(iter(layers.values())).taps
        self.channels = sum(s.size for s in segments)
        self.width = self.channels * self.taps + bool(bias)

    @property
    def bias(self) -> bool:
        """Whether the bias is one of the weights."""
        return bool(self._bias)

    def columns(self, task: int) -> Tensor:
        """The columns of the task's weight matrix [units, inputs * taps + 1] that are common."""
        own = [s.channels[task] for s in self._segments if task in s.owners]
        bias = [self._layers[task].inputs * self.taps] if task in self._bias else []
        return _columns(np.concatenate([np.empty(0, np.int64), *own]), self.taps, bias)

    def places(self, task: int) -> Tensor:
        """Where these columns lie in the common vector."""
        starts = np.cumsum([0, *(s.size for s in self._segments)])
        pairs = zip(self._segments, starts, strict=False)
        own = [np.arange(len(s.channels[task])) + start for s, start in pairs if task in s.owners]
        bias = [self.width - 1] if task in self._bias else []
        return _columns(np.concatenate([np.empty(0, np.int64), *own]), self.taps, bias)

    def weights(self, task: int, rows: Float[Tensor, "units d1"]) -> Float[Tensor, "units width"]:
        """The common part of a task's weights, 0 where a connection is fictive."""
        columns = self.columns(task)
        if self.width == rows.shape[1] and torch.equal(columns, torch.arange(self.width)):
            return rows
        return self.placed(task, rows[:, columns.to(rows.device)])

    def placed(self, task: int, part: Float[Tensor, "units c"]) -> Float[Tensor, "units width"]:
        """Weights over a task's common columns, with 0 where a connection is fictive."""
        if part.shape[1] == self.width:
            return part
        return part.new_zeros(len(part), self.width).index_copy(1, self.places(task).to(part.device), part)

    def real(self, tasks: Iterable[int]) -> Bool[Tensor, " width"]:
        """Which of the common connections any of the tasks has; the others are fictive."""
        places = torch.cat([self.places(task) for task in tasks])
        return torch.zeros(self.width, dtype=torch.bool).index_fill_(0, places, True)

    def curvature(self, task: int, h: Float[Tensor, "d d"] | Factored) -> Float[Tensor, "width width"] | Factored:
        """A curvature over the task's common columns with zeros for fictive connections."""
        if len(h) == self.width:
            return h
        if isinstance(h, Factored):
            return h.placed(self.places(task).to(h.rows.device), self.width)
        places = self.places(task).to(h.device)
        whole = h.new_zeros(self.width, self.width)
        whole[places[:, None], places] = h
        return whole

    def write(
        self, task: int, rows: Float[Tensor, "units d1"], common: Float[Tensor, "units width"]
    ) -> Float[Tensor, "units d1"]:
        """A task's weights with the common part put in."""
        columns, places = self.columns(task).to(rows.device), self.places(task).to(rows.device)
        return rows.index_copy(1, columns, common[:, places])


def _columns(channels: np.ndarray, taps: int, bias: list[int]) -> Tensor:
    """The columns of some channels, and that of the bias."""
    columns = (channels[:, None] * taps + np.arange(taps)).ravel()
    return torch.from_numpy(np.append(columns, bias).astype(np.int64))


def align_inputs(
    members: Sequence[Member],
    layers: Mapping[int, Layer],
    slots: Mapping[int, Slots] | None = None,
    *,
    cross: bool = True,
) -> JointInputs:
    """Which inputs of a layer its tasks share: the networks' input by position, hidden units by their slots.

    Hidden units in a fixed order are shared by position where the tasks' layers read equally many of them; but not
    without `cross`, as no layer that wrote them shares its weights.

    Args:
        members: the tasks.
        layers: the layer in each task that takes part.
        slots: where the units of each task stand, if not where the members say.
        cross: whether units read inputs that not all of their owners have.
    """
    sources: dict[int | None, dict[int, _Read]] = {}
    for t, layer in layers.items():
        found = _sources(members[t], layer, members[t].slots if slots is None else slots[t])
        if cross:
            found |= _fixed(members[t], layer)
        for source, read in found.items():
            sources.setdefault(source, {})[t] = read
    raw = {t: read.slots for t, read in sources.pop(None, {}).items()}
    segments = [Segment(tuple(raw), raw)] if len(raw) > 1 else []
    segments += [each for source, read in sources.items() if len(read) > 1 for each in _segments(source, read)]
    bias = tuple(t for t, layer in layers.items() if layer.bias is not None)
    return JointInputs(layers, tuple(segments), bias, cross)


class _Read(NamedTuple):
    """Units that a layer reads: their slots, and the channels of each, [units, times that each is read]."""

    slots: np.ndarray
    channels: np.ndarray


def _sources(member: Member, layer: Layer, slots: Slots) -> dict[int | None, _Read]:
    """What a layer reads of each joint space; the network's own input, under None, counts as one unit a channel."""
    if layer.reads_input:
        return {None: _Read(np.arange(layer.inputs), np.arange(layer.inputs)[:, None])}
    found: dict[int | None, _Read] = {}
    if layer.columns is None:
        return found
    for space, (joint, units) in slots.items():
        channels = member.structure.spaces[space].positions(layer.columns)
        if channels.size:
            found.setdefault(joint, _Read(units, channels))
    return found


def _fixed(member: Member, layer: Layer) -> dict[int | None, _Read]:
    """The hidden units in a fixed order that a layer reads, each channel one of them, by how many these are."""
    if layer.reads_input:
        return {}
    columns = layer.columns
    channels = np.arange(layer.inputs) if columns is None else np.flatnonzero(member.structure.space_of(columns) < 0)
    return {-len(channels): _Read(np.arange(len(channels)), channels[:, None])} if len(channels) else {}


def _segments(source: int | None, read: Mapping[int, _Read]) -> Iterator[Segment]:
    """The slots that the same two or more tasks read; where tasks read a unit differently often, none."""
    if len({each.channels.shape[1] for each in read.values()}) > 1:
        return
    place = np.full((len(read), 1 + max(each.slots.max() for each in read.values())), -1)
    for k, each in enumerate(read.values()):
        place[k, each.slots] = np.arange(len(each.slots))
    patterns, pattern = np.unique(place >= 0, axis=1, return_inverse=True)
    for index, present in enumerate(patterns.T):
        if present.sum() > 1:
            where = np.flatnonzero(pattern == index)
            tasks = [(k, t) for k, t in enumerate(read) if present[k]]
            channels = {t: read[t].channels[place[k, where]].ravel() for k, t in tasks}
            yield Segment(tuple(channels), channels, source)
