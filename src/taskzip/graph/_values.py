"""What the analysis knows of a tensor: for each axis the units along it, or None where the order is fixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.fx import Node

from taskzip.graph._units import Ids, Units

Axes = tuple[Ids | None, ...]


@dataclass(frozen=True)
class Value:
    """A tensor in the graph; `raw` as long as no layer has touched it, that is, while it is still the network's input."""

    axes: Axes
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
    """The state of one analysis: units, values of the nodes seen so far, and the layer calls found."""

    def __init__(self) -> None:
        self.units = Units()
        self.values: dict[Node, Value | list[Value]] = {}
        self.parameters: dict[str, list[Ids | None]] = {}
        self._name_of: dict[Node, str] = {}
        self._untouched: set[tuple[str, int]] = set()
        self.calls: list[Call] = []
        self.followed_by: dict[Node, Node] = {}

    def add_parameter(self, node: Node, name: str) -> None:
        """A tensor of the network that may be re-ordered: new units along every axis; tied weights are one tensor."""
        self._name_of[node] = name
        self.values[node] = Value((), raw=True)
        if name not in self.parameters:
            shape = shape_of(node)
            self.parameters[name] = [self.units.fresh(size) if size > 1 else None for size in shape]
            self._untouched |= {(name, dim) for dim in range(len(shape))}

    def axes(self, node: Any) -> Axes:
        """The axes of a tensor argument."""
        name = self._name_of.get(node)
        if name is not None:
            self._untouched -= {(name, dim) for dim in range(len(self.parameters[name]))}
            return tuple(self.parameters[name])
        value = self.values[node]
        assert isinstance(value, Value)
        return value.axes

    def rows(self, weight: Node, dim: int = 0) -> Ids | None:
        """One axis of a weight, which stays free to be laid along others."""
        return self.parameters[self._name_of[weight]][dim] if weight in self._name_of else self.axes(weight)[dim]

    def lay(self, node: Any, dim: int, along: Ids | None, reason: str) -> Ids | None:
        """Axis `dim` of `node` is in the order of `along` from now on.

        An axis of a parameter that nothing has read before simply takes the units of `along`, which may repeat (after a
        flatten, H * W columns belong to one unit); any other axis has to be the same unit for unit.
        """
        name = self._name_of.get(node)
        if name is not None and (name, dim) in self._untouched:
            self._untouched.discard((name, dim))
            own = self.parameters[name][dim]
            if along is None:
                self.pin((own,), reason)
            elif own is not None:
                self.parameters[name][dim] = along
                return along
            return None
        axes = self.parameters[name] if name is not None else self.axes(node)
        return self.unify(axes[dim], along, reason)

    def unify(self, one: Ids | None, other: Ids | None, reason: str) -> Ids | None:
        """Two axes are in the same order from now on; if one of them is fixed, so is the other."""
        if one is None or other is None:
            self.pin((one, other), reason)
            return None
        return self.units.unify(one, other, reason)

    def pin(self, axes: Axes, reason: str) -> None:
        """Nothing along these axes moves."""
        for ids in axes:
            if ids is not None:
                self.units.pin(ids, reason)

    def pin_value(self, node: Node, reason: str) -> None:
        """Nothing of what `node` gives moves."""
        value = self.values[node]
        for axes in [one.axes for one in value] if isinstance(value, list) else [self.axes(node)]:
            self.pin(axes, reason)

    def known(self, ids: Ids | None, size: int, reason: str) -> Ids:
        """The ids of an axis; for a fixed axis, new ones that never move."""
        if ids is not None:
            return ids
        fixed = self.units.fresh(size)
        self.units.pin(fixed, reason)
        return fixed

    def take(self, ids: Ids | None, index: Any, reason: str) -> Ids | None:
        """A part of an axis: the units inside are no longer alike to those outside, and a unit cut in two stays put."""
        if ids is None:
            return None
        part = ids[index]
        whole = dict(zip(*_counts(self.units.roots(ids)), strict=True))
        inside = dict(zip(*_counts(self.units.roots(part)), strict=True))
        cut = [u for u, n in inside.items() if n < whole[u]]
        if cut:
            self.units.pin(np.array(cut), reason)
        if len(inside) < len(whole):
            self.units.split(part, ["inside"] * len(part))
        return part


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of the tensor that a node gives."""
    return tuple(int(size) for size in node.meta["val"].shape)


def _counts(ids: Ids) -> tuple[list[int], list[int]]:
    values, counts = np.unique(ids, return_counts=True)
    return values.tolist(), counts.tolist()
