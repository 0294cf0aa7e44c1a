"""Layers computed block by block, so that no runtime has to put a weight together from its blocks.

A runtime that is given a weight as `Concat` and `Gather` of constants puts it together when it loads the file, once for
every task, so that what was shared becomes copies. Here the units of a layer are computed in groups, each from its own
blocks, and what is put together and re-ordered is what the layer reads and gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Part:
    """A block, and which rows and columns of the whole weight it is."""

    block: Any
    rows: Indices
    columns: Indices

    def moved(self, by: int, axis: int) -> _Part:
        rows, columns = (self.rows + by, self.columns) if axis == 0 else (self.rows, self.columns + by)
        return _Part(self.block, rows, columns)

    def reordered(self, where: Indices, axis: int) -> _Part:
        rows, columns = (where[self.rows], self.columns) if axis == 0 else (self.rows, where[self.columns])
        return _Part(self.block, rows, columns)


def split_layers(model: Any) -> None:
    """Compute every `Conv`, `Gemm` and `MatMul` whose weight is put together from blocks block by block, in place."""
    for node in list(model.graph):
        if node.op_type in ("Conv", "Gemm", "MatMul") and _plain(node):
            weight = _weight(node)
            parts = None if weight is None else _parts(weight)
            if parts is not None and not (len(parts) == 1 and parts[0].block is weight) and _in_groups(parts):
                _Split(model.graph, node, parts).run()


def _plain(node: Any) -> bool:
    """Whether a unit of the layer reads all columns of its row of the weight, and nothing is scaled."""
    found = {name: each.value for name, each in node.attributes.items()}
    if node.op_type == "Gemm":
        plain = found.get("transA", 0) == 0 and found.get("alpha", 1) == found.get("beta", 1) == 1
        return plain and found.get("transB", 0) == 1
    return found.get("group", 1) == 1


def _weight(node: Any) -> Any:
    """The weight, [units, inputs, ...]; `MatMul` reads it transposed."""
    if node.op_type != "MatMul":
        return node.inputs[1]
    transpose = node.inputs[1].producer()
    turned = transpose is not None and transpose.op_type == "Transpose" and len(transpose.inputs[0].shape) == 2
    return transpose.inputs[0] if turned else None


def _parts(value: Any) -> list[_Part] | None:
    """The blocks of a weight or bias; None where it is computed in another way."""
    node = value.producer()
    if value.is_initializer() or (node is not None and node.op_type == "Slice"):  # of a block that others have wider
        shape = value.shape.numpy()
        return [_Part(value, np.arange(shape[0]), np.arange(shape[1] if len(shape) > 1 else 1))]
    if node is None or node.op_type not in ("Concat", "Gather"):
        return None
    axis = node.attributes["axis"].value if "axis" in node.attributes else 0
    if axis not in (0, 1):  # inside of the kernels, or counted from behind
        return None
    if node.op_type == "Gather":
        whole, order = _parts(node.inputs[0]), node.inputs[1].const_value
        if whole is None or order is None:
            return None
        where = np.argsort(order.numpy())
        units = 1 + max(int((part.columns if axis else part.rows).max()) for part in whole)
        is_permutation = np.array_equal(order.numpy()[where], np.arange(units))
        return [part.reordered(where, axis) for part in whole] if is_permutation else None
    found, start = [], 0
    for each in node.inputs:
        whole = _parts(each)
        if whole is None:
            return None
        found += [part.moved(start, axis) for part in whole]
        start += each.shape[axis]
    return found


def _in_groups(parts: Sequence[_Part]) -> bool:
    """Whether every unit is in one group: blocks side by side are of the same units."""
    groups = {tuple(part.rows) for part in parts}
    return len({row for rows in groups for row in rows}) == sum(map(len, groups))


class _Split:
    """One layer, which becomes several."""

    def __init__(self, graph: Any, node: Any, parts: Sequence[_Part]) -> None:
        self.graph, self.node = graph, node
        self.inputs = 1 + max(int(part.columns.max()) for part in parts)
        self.groups: dict[tuple[int, ...], list[_Part]] = {}
        for part in parts:
            self.groups.setdefault(tuple(part.rows), []).append(part)
        self.axis = -1 if node.op_type == "MatMul" else 1
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        zero = bias is not None and bias.const_value is not None and not bias.const_value.numpy().any()
        self.bias = None if zero else bias  # where a convolution has none, the exporter writes zeros

    def run(self) -> None:
        """Put the new nodes where the old one was."""
        groups = [self._units(rows, parts) for rows, parts in self.groups.items()]
        whole = groups[0] if len(groups) == 1 else self._op("Concat", groups, axis=self.axis)
        whole = self._take(whole, np.argsort(np.concatenate(list(self.groups))))
        old = self.node.outputs[0]
        whole.type, whole.shape = old.type, old.shape
        old.replace_all_uses_with(whole, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)

    def _units(self, rows: tuple[int, ...], parts: list[_Part]) -> Any:
        """What a group of units gives: the sum over its blocks."""
        bias = self._bias(np.array(rows))
        given = None
        for part in parts:
            x = self._take(self.node.inputs[0], part.columns, self.inputs)
            block = self._op("Transpose", [part.block], perm=[1, 0]) if self.axis == -1 else part.block
            attributes = {name: each.value for name, each in self.node.attributes.items()}
            y = self._op(self.node.op_type, [x, block, *([bias] if bias is not None else [])], **attributes)
            given, bias = y if given is None else self._op("Add", [given, y]), None
        return given

    def _bias(self, rows: Indices) -> Any:
        if self.bias is None:
            return None
        for part in _parts(self.bias) or []:
            if np.array_equal(part.rows, rows):
                return part.block
        return self._op("Gather", [self.bias, self._constant(rows)], axis=0)

    def _take(self, value: Any, which: Indices, size: int | None = None) -> Any:
        """Some of the units of a tensor, in the order that is given."""
        start, end = int(which[0]), int(which[-1]) + 1
        if not np.array_equal(which, np.arange(start, end)):
            return self._op("Gather", [value, self._constant(which)], axis=self.axis)
        if len(which) == (size or len(which)):
            return value
        return self._op("Slice", [value, *(self._constant(np.array([n])) for n in (start, end, self.axis))])

    def _constant(self, numbers: Indices) -> Any:
        import onnx_ir

        return self._op("Constant", [], value=onnx_ir.tensor(numbers.astype(np.int64)))

    def _op(self, kind: str, inputs: Sequence[Any], **attributes: Any) -> Any:
        import onnx_ir

        made = onnx_ir.node(kind, inputs, attributes)
        self.graph.insert_before(self.node, made)
        return made.outputs[0]
