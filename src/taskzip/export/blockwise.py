"""Layers computed block by block: a runtime that packs weights when it loads a file needs them to be constants.

The units of a layer fall into groups by the tasks that own them. Each group is computed from its own blocks, each block
from the inputs that it reads; what is put together and brought into order is then what the layer gives, and no longer
its weight. So every block is a constant, the same one for all tasks that use it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from taskzip.export.graphs import JointGraph, arguments, aten

LAYERS = (
    aten.linear.default,
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
)
"""Operators that are called with input, weight and bias."""


@dataclass(frozen=True)
class _Block:
    """A constant, and which inputs of the layer its columns read; columns beyond these read nothing."""

    weight: Node
    columns: list[int]


@dataclass(frozen=True)
class _Group:
    """Some units of a layer, and the blocks from which they are computed."""

    units: list[int]
    blocks: list[_Block]


def split_layers(graph: JointGraph, largest: float, smallest: Mapping[OpOverload, int] | None = None) -> None:
    """Compute layers whose weights are put together block by block, in place.

    Args:
        graph: of the tasks.
        largest: bytes above which a constant is split into several, each for some of the units.
        smallest: numbers in the weight below which layers stay as they are, by operator; default 0.
    """
    for node in graph.operators():
        if node.target in LAYERS and all(groups == 1 for groups in arguments(node)[6:]):
            layer = _Layer(graph, node)
            if layer.weight.meta["val"].numel() < (smallest or {}).get(node.target, 0):
                continue
            groups = _groups(graph, layer.weight) if layer.weight.meta["val"].dim() > 1 else None
            if groups is None or (layer.bias is not None and graph.value(layer.bias) is None):
                continue
            is_whole = len(groups) == len(groups[0].blocks) == 1 and groups[0].blocks[0].weight is layer.weight
            if not is_whole or layer.weight.meta["val"].nbytes > largest:
                layer.split(groups, largest)
    graph.unite()


def join_weights(graph: JointGraph) -> None:
    """Make every weight and bias that is put together from blocks a constant of its own, in place."""
    for node in graph.operators():
        for argument in arguments(node)[1:3] if node.target in LAYERS else ():
            value = graph.value(argument)
            if isinstance(argument, Node) and argument.op == "call_function" and value is not None:
                graph.replace(argument, graph.constant(argument.name, value))
    graph.unite()


def give_own_weights(graph: JointGraph) -> None:
    """Let no two convolutions of one axis have one weight, in place; ExecuTorch writes what is equal once all the same.

    It turns them into those of two axes, and their weights, of which it takes each to be the weight of one.
    """
    seen: set[Node] = set()
    for node in graph.operators():
        if node.target in (aten.conv1d.default, aten.conv1d.padding):
            weight = arguments(node)[1]
            if weight in seen and graph.value(weight) is not None:
                node.update_arg(1, graph.copied(weight))
            seen.add(weight)


class _Layer:
    """A linear layer or a convolution, which reads and gives its units along one axis, behind that of any batch."""

    def __init__(self, graph: JointGraph, node: Node) -> None:
        self._graph, self._node = graph, node
        given = arguments(node)
        self._input, self.weight, self.bias, *self._settings = given if len(given) > 2 else [*given, None]
        self._shape = self._input.meta["val"].shape
        self._axis = len(self._shape) - (self.weight.meta["val"].dim() - 1)

    def split(self, groups: list[_Group], largest: float) -> None:
        """Put the sums and rows of blocks in the place of the layer."""
        whole = self._row([self._units(group, largest) for group in groups])
        units = [unit for group in groups for unit in group.units]
        self._graph.replace(self._node, self._chosen(whole, torch.argsort(torch.tensor(units)).tolist(), len(units)))

    def _units(self, group: _Group, largest: float) -> Node:
        """What the layer gives for some of its units."""
        bias, total = self._graph.value(self.bias), None
        for block in group.blocks:
            addend = None if bias is None or total is not None else bias[group.units]
            term = self._product(block, addend, largest)
            total = term if total is None else self._call(aten.add.Tensor, total, term)
        assert total is not None
        return total

    def _product(self, block: _Block, bias: Tensor | None, largest: float) -> Node:
        """A block times what it reads. How it is cut depends on nothing but itself: other tasks cut it as well."""
        inputs, values = self._read(block), block.weight.meta["val"]
        count = max(1, math.ceil(values.nbytes / largest))
        size = -(-len(values) // count)
        terms = []
        for start in range(0, len(values), size):
            rows = slice(start, start + size)
            weight = block.weight
            if count > 1:
                weight = self._graph.constant(f"{weight.target}_{start}", values[rows])
            addend = None if bias is None else self._graph.constant("bias", bias[rows])
            terms.append(self._call(self._node.target, inputs, weight, addend, *self._settings))
        return self._row(terms)

    def _row(self, parts: list[Node]) -> Node:
        """Side by side along the axis of the units."""
        return self._call(aten.cat.default, parts, self._axis) if len(parts) > 1 else parts[0]

    def _read(self, block: _Block) -> Node:
        """The inputs of a block, with zeros for columns that read nothing."""
        inputs = self._chosen(self._input, block.columns, self._shape[self._axis])
        beyond = block.weight.meta["val"].shape[1] - len(block.columns)
        if not beyond:
            return inputs
        return self._call(
            aten.constant_pad_nd.default, inputs, [0, 0] * (len(self._shape) - 1 - self._axis) + [0, beyond]
        )

    def _chosen(self, node: Node, places: list[int], count: int) -> Node:
        """The units of a node that lie at these places, in this order."""
        if places == list(range(count)):
            return node
        if places == list(range(places[0], places[-1] + 1)):
            return self._call(aten.slice.Tensor, node, self._axis, places[0], places[-1] + 1)
        order = self._graph.constant("order", torch.tensor(places, device=self.weight.meta["val"].device))
        return self._call(aten.index_select.default, node, self._axis, order)

    def _call(self, target: Any, *args: Any) -> Node:
        return self._graph.call(self._node, target, *args)


def _groups(graph: JointGraph, weight: Node) -> list[_Group] | None:
    """How a weight is put together; None where it is computed in another way."""
    if weight.op == "get_attr" or _is_narrowed(weight):
        units, inputs = weight.meta["val"].shape[:2]
        block = weight if weight.op == "get_attr" else arguments(weight)[0]
        return [_Group(list(range(units)), [_Block(block, list(range(inputs)))])]
    if weight.target == aten.cat.default:
        parts, axis = [*arguments(weight), 0][:2]
        wholes = [_groups(graph, part) for part in parts]
        known = [whole for whole in wholes if whole is not None]
        if len(known) == len(wholes) and axis in (0, 1):
            return _one_below_the_other(known) if axis == 0 else _side_by_side(known)
    if weight.target == aten.index_select.default:
        source, axis, index = arguments(weight)
        groups, order = _groups(graph, source), graph.value(index)
        if groups is not None and order is not None and axis in (0, 1) and _is_permutation(order, weight, axis):
            return _in_order(groups, axis, order)
    return None


def _is_narrowed(weight: Node) -> bool:
    """Whether it is the first columns of a block, of which a wider task uses all."""
    block, *settings = weight.args
    is_constant = isinstance(block, Node) and block.op == "get_attr"
    return weight.target == aten.slice.Tensor and is_constant and settings[:2] == [1, 0] and len(settings) == 3


def _is_permutation(order: Tensor, ordered: Node, axis: int) -> bool:
    return order.sort().values.tolist() == list(range(arguments(ordered)[0].meta["val"].shape[axis]))


def _one_below_the_other(wholes: list[list[_Group]]) -> list[_Group]:
    found: list[_Group] = []
    for whole in wholes:
        start = sum(len(group.units) for group in found)
        found += [replace(group, units=[start + unit for unit in group.units]) for group in whole]
    return found


def _side_by_side(wholes: list[list[_Group]]) -> list[_Group] | None:
    if any(len(whole) > 1 or whole[0].units != wholes[0][0].units for whole in wholes):
        return None
    blocks: list[_Block] = []
    for (group,) in wholes:
        start = sum(len(block.columns) for block in blocks)
        blocks += [replace(block, columns=[start + column for column in block.columns]) for block in group.blocks]
    return [replace(wholes[0][0], blocks=blocks)]


def _in_order(groups: list[_Group], axis: int, order: Tensor) -> list[_Group]:
    """What was the row or column `order[i]` lies at `i` now."""
    place = torch.argsort(order).tolist()
    if axis == 0:
        return [replace(group, units=[place[unit] for unit in group.units]) for group in groups]
    return [
        replace(group, blocks=[replace(b, columns=[place[column] for column in b.columns]) for b in group.blocks])
        for group in groups
    ]
