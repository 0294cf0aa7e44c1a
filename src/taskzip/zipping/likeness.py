"""Which layers of several networks are alike: their sequences are aligned, as sequences of molecules are.

Two layers can be put together where both compute units that may change places, with weights of one form (kind and
kernel), and where neither contradicts what was put together before: a space of units has one partner. The alignment of
most likeness is found by dynamic programming (Needleman, Wunsch, 1970); what likeness a pair has depends on the pairs
before it, of which every cell keeps those of its best alignment. Further networks are aligned one by one with all that
is there, those of most layers first, so that the order in which they are given does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from taskzip.graph import Layer, Structure

_INPUT, _FIXED = -1, -2
"""In place of a space: the network's own input, and other inputs in a fixed order."""

_READABLE = 0.2
"""Likeness of layers that have inputs in common, on top of the fraction of weights that they could share (0 to 1)."""
_NAMED = 1.0
"""On top of that, where both have the same name."""
_NORMED = 0.1
"""On top of that, where batch-norm follows both or neither."""
_PRIVATE = 0.3
"""Likeness of layers that share nothing for the same reason, such as outputs."""
_UNREADABLE = 0.02
"""Part of the likeness that is left of layers without inputs in common."""
_FAR = 0.01
"""By so much less alike are the first and the last layer."""


class _Description(NamedTuple):
    """What counts of a layer: per space that it reads, the columns, and how often each unit occurs among them."""

    layer: Layer
    reads: Mapping[int, tuple[int, int]]
    place: float


class _Pairs(NamedTuple):
    """Spaces that belong together: of the joint network to those of one more, and back."""

    there: Mapping[int, int]
    back: Mapping[int, int]


class _Cell(NamedTuple):
    """The best alignment of the first columns with the first layers, its last step, and which spaces it joins."""

    score: float
    step: tuple[int, int]
    pairs: _Pairs


@dataclass(frozen=True)
class _Column:
    """Layers that were put together, by the numbers of their networks: which they are, and what they are."""

    layers: Mapping[int, int]
    joint: Sequence[tuple[_Description, Sequence[int]]]
    """Per layer its description, with spaces numbered as those of the joint network, and those that it writes."""


def aligned(networks: Sequence[Structure]) -> list[list[str]]:
    """Per network, a key for each of its layers; those with the same key correspond."""
    columns: list[_Column] = []
    spaces = 0
    for t in sorted(range(len(networks)), key=lambda t: _rank(networks[t])):
        described = _described(networks[t])
        steps, pairs = _align(columns, described)
        joint = {space: pairs.back.get(space, spaces + space) for space in range(len(networks[t].spaces))}
        spaces += len(networks[t].spaces)
        columns = list(_extended(columns, described, steps, t, joint))
    keys = [[""] * len(network.layers) for network in networks]
    for key, column in enumerate(columns):
        for t, place in column.layers.items():
            keys[t][place] = str(key)
    return keys


def _rank(network: Structure) -> tuple[object, ...]:
    """Networks of most layers first; nothing here depends on the order in which they are given."""
    return -len(network.layers), [(layer.form, -layer.units, -layer.inputs, layer.name) for layer in network.layers]


def _described(network: Structure) -> list[_Description]:
    count = max(len(network.layers), 1)
    return [_Description(layer, _reads(network, layer), k / count) for k, layer in enumerate(network.layers)]


def _reads(network: Structure, layer: Layer) -> dict[int, tuple[int, int]]:
    if layer.columns is None:
        return {_INPUT if layer.reads_input else _FIXED: (layer.inputs, 1)}
    spaces, counts = np.unique(network.space_of(layer.columns), return_counts=True)
    return {
        space if space >= 0 else _FIXED: (n, n // len(network.spaces[space].units) if space >= 0 else 1)
        for space, n in zip(spaces.tolist(), counts.tolist(), strict=True)
    }


def _align(columns: Sequence[_Column], layers: Sequence[_Description]) -> tuple[list[tuple[int, int]], _Pairs]:
    """The steps of the best alignment, (1, 1) for a pair, (1, 0) or (0, 1) for what stays alone; its joint spaces."""
    cells = [[_Cell(0.0, (0, 1), _Pairs({}, {}))] * (len(layers) + 1)]
    for i, column in enumerate(columns):
        row = [_Cell(0.0, (1, 0), _Pairs({}, {}))]
        for j, layer in enumerate(layers):
            above, left, before = cells[i][j + 1], row[j], cells[i][j]
            best = max(above._replace(step=(1, 0)), left._replace(step=(0, 1)), key=lambda cell: cell.score)
            likeness = max((_likeness(*each, layer, before.pairs) for each in column.joint), default=0.0)
            if likeness > 0 and before.score + likeness >= best.score:
                best = _Cell(before.score + likeness, (1, 1), _joined(column, layer, before.pairs))
            row.append(best)
        cells.append(row)
    i, j = len(columns), len(layers)
    steps = []
    while i or j:
        down, right = cells[i][j].step
        steps.append((down, right))
        i, j = i - down, j - right
    return steps[::-1], cells[-1][-1].pairs


def _likeness(one: _Description, writes: Sequence[int], other: _Description, pairs: _Pairs) -> float:
    """How alike two layers are; 0 where they cannot be put together."""
    a, b = one.layer, other.layer
    named = _NAMED if a.name == b.name else 0.0
    far = _FAR * abs(one.place - other.place)
    if a.pinned or b.pinned:
        return _PRIVATE * (1 + named) - far if a.pinned == b.pinned and a.form == b.form else 0.0
    if a.form != b.form or len(writes) != len(b.spaces):
        return 0.0
    if any(pairs.there.get(x, y) != y or pairs.back.get(y, x) != x for x, y in zip(writes, b.spaces, strict=True)):
        return 0.0
    common = sum(_common(space, read, other, pairs) for space, read in one.reads.items())
    normed = _NORMED if bool(a.batch_norm) == bool(b.batch_norm) else 0.0
    whole = a.units * sum(n for n, _ in one.reads.values()) + b.units * sum(n for n, _ in other.reads.values())
    if not common:
        return _UNREADABLE * (2 * min(a.units, b.units) / (a.units + b.units) + named + normed) - far
    return _READABLE + 2 * min(a.units, b.units) * common / whole + named + normed - far


def _common(space: int, read: tuple[int, int], other: _Description, pairs: _Pairs) -> int:
    """How many inputs two layers have in common of one space of the first."""
    n, times = read
    m, others = other.reads.get(pairs.there.get(space, -3) if space >= 0 else space, (0, 0))
    return min(n, m) if times == others and (space != _FIXED or n == m) else 0


def _joined(column: _Column, layer: _Description, pairs: _Pairs) -> _Pairs:
    """The joint spaces with those that a new pair of layers writes."""
    there, back = dict(pairs.there), dict(pairs.back)
    for _, writes in column.joint:
        for x, y in zip(writes, layer.layer.spaces, strict=False):
            if there.setdefault(x, y) == y:
                back.setdefault(y, x)
    return _Pairs(there, back)


def _extended(
    columns: Sequence[_Column],
    layers: Sequence[_Description],
    steps: Sequence[tuple[int, int]],
    task: int,
    joint: Mapping[int, int],
) -> Iterator[_Column]:
    """The columns with one more network."""
    i = j = 0
    for down, right in steps:
        found = columns[i] if down else _Column({}, ())
        if right:
            layer = layers[j]
            reads = {joint.get(space, space): read for space, read in layer.reads.items()}
            writes = [joint[space] for space in layer.layer.spaces]
            found = _Column({**found.layers, task: j}, (*found.joint, (layer._replace(reads=reads), writes)))
        yield found
        i, j = i + down, j + right
