"""What the analysis knows of a tensor: for each axis the units along it, or None where the order is fixed.

After a view that splits an axis, units lie along several axes at once: these are its *strands*. Rules for views and for
ops on single elements pass strands on (`Context.strands`), so that a channel shuffle is but a new order. All others
ask for `Context.axes`, which makes one unit of all that lie at the same index of the first strand: a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Node

from taskzip.graph._units import Ids, Units

Axes = tuple[Ids | None, ...]


@dataclass(frozen=True, eq=False)
class Strand:
    """Axis `dim` of a grid of units that lie along several axes of a tensor, each of which has a strand of it.

    Read row by row, the grid is a stretch of an axis whose units may change places; `dim` counts the axes of the grid,
    which may lie in another order in the tensor.
    """

    grid: Ids
    dim: int


Strands = tuple[Ids | Strand | None, ...]


@dataclass(frozen=True)
class Value:
    """A tensor in the graph; `raw` as long as no layer has touched it: it is still the network's input."""

    axes: Strands
    raw: bool = False


@dataclass(frozen=True)
class Call:
    """One use of a layer's weight: which node reads which input, with which arguments."""

    node: Node
    kind: str
    weight: Node
    bias: Node | None
    reads: Ids | None
    raw: bool
    groups: int


class Context:
    """The state of one analysis: units, values of the nodes seen so far, and the layer calls found.

    Attributes:
        parameters: the axes of each tensor of the network that may be re-ordered, by its name.
        calls: every use of a weight by a linear layer or a convolution.
        norms: every batch-norm, by the node that it reads.
        names: the name of each tensor of the network, by its node.
        constants: the tensors that are written into the graph, by their nodes.
    """

    def __init__(self) -> None:
        self.units = Units()
        self.values: dict[Node, Value | list[Value]] = {}
        self.parameters: dict[str, Axes] = {}
        self.calls: list[Call] = []
        self.norms: dict[Node, Node] = {}
        self.names: dict[Node, str] = {}
        self.constants: dict[Node, Tensor] = {}

    def further(self) -> Context:
        """For another call of the same network: units and tensors are the same, nodes and layers are its own."""
        other = Context()
        other.units, other.parameters = self.units, self.parameters
        return other

    def add_parameter(self, node: Node, name: str) -> None:
        """A tensor of the network that may be re-ordered: new units along every axis; tied weights are one tensor."""
        self.names[node] = name
        if name not in self.parameters:
            self.parameters[name] = tuple(self.units.fresh(n) if n > 1 else None for n in shape_of(node))
        self.values[node] = Value(self.parameters[name], raw=True)

    def strands(self, node: Any) -> Strands:
        """The axes of a tensor argument, for rules that know of strands."""
        value = self.values[node]
        assert isinstance(value, Value)
        return value.axes

    def axes(self, node: Any) -> Axes:
        """The axes of a tensor argument; units that lie along several of them move from now on along one."""
        value = self.values[node]
        assert isinstance(value, Value)
        axes = tuple(self._one_axis(axis) for axis in value.axes)
        self.values[node] = Value(axes, value.raw)
        return axes

    def _one_axis(self, axis: Ids | Strand | None) -> Ids | None:
        if not isinstance(axis, Strand):
            return axis
        return self.units.fuse(axis.grid, len(axis.grid)) if axis.dim == 0 else None

    def unify(self, one: Ids | None, other: Ids | None, reason: str) -> Ids | None:
        """Two axes are in the same order from now on; if one of them is fixed, so is the other."""
        if one is None or other is None:
            self.pin((one, other), reason)
            return None
        return self.units.unify(one, other)

    def broadcast(self, nodes: Sequence[tuple[Axes, Sequence[int]]], shape: Sequence[int], reason: str) -> Axes:
        """The axes of what tensors of these axes and shapes give together, aligned at their last axes.

        Where a tensor has a single element along an axis, that element meets every unit alike.
        """
        out: list[Ids | None] = [None] * len(shape)
        seen = [False] * len(shape)
        for axes, sizes in nodes:
            for i, ids, size in zip(range(len(shape) - len(sizes), len(shape)), axes, sizes, strict=True):
                if size == shape[i] > 1:
                    out[i] = self.unify(out[i], ids, reason) if seen[i] else ids
                    seen[i] = True
        return tuple(out)

    def pin(self, axes: Strands, reason: str) -> None:
        """Nothing along these axes moves."""
        for axis in axes:
            if axis is not None:
                self.units.pin(axis.grid.ravel() if isinstance(axis, Strand) else axis, reason)

    def pin_value(self, node: Node, reason: str) -> None:
        """Nothing of what `node` gives moves."""
        for value in flat(self.values[node]):
            self.pin(value.axes, reason)

    def join(self, parts: Sequence[Ids | None], sizes: Sequence[int], reason: str) -> Ids | None:
        """An axis made of several end to end; those in a fixed order stay where they are."""
        if all(ids is None for ids in parts):
            return None
        known = []
        for ids, size in zip(parts, sizes, strict=True):
            if ids is None:
                ids = self.units.fresh(size)
                self.units.pin(ids, reason)
            known.append(ids)
        whole = np.concatenate(known)
        self.units.divide(whole, np.repeat(np.arange(len(sizes)), sizes))
        return whole

    def take(self, ids: Ids | None, index: slice | list[int]) -> Ids | None:
        """A part of an axis."""
        if ids is None:
            return None
        inside = np.zeros(len(ids), bool)
        inside[index] = True
        part = self.units.part(ids, inside)
        return part if len(part) > 1 else None


def flat(value: Value | list[Value]) -> list[Value]:
    """The tensors that a node gives."""
    return value if isinstance(value, list) else [value]


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of the tensor that a node gives."""
    return tuple(int(size) for size in node.meta["val"].shape)
