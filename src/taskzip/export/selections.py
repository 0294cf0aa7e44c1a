"""What a layer reads of some units only is computed from these units alone, in an ONNX graph.

Where groups of units are computed one by one, each task puts them together, works on them element by element, and takes
out again what the shared units of the next layer read: select(relu(concat(shared, own))). That is relu(shared), which
names no task any more, and equal nodes then become one. A selection is moved up through operators that leave the units
apart, to the `Concat` where they came together; through any other operator it is not moved.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_ELEMENTWISE = {
    "Abs", "Add", "Cast", "Ceil", "Celu", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "Pow", "Reciprocal", "Relu",
    "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Tanh", "ThresholdedRelu",
}  # fmt: skip
_POOLS = {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "MaxPool"}  # over all axes after the second

_DEEPEST = 150
"""Operators through which a selection is moved up, so that Python's own limit is not met."""


class _Selection(NamedTuple):
    """Some places along an axis of a value."""

    value: Any
    axis: int
    places: tuple[int, ...]


def move_selections(model: Any) -> None:
    """Move every selection of units up to where the units came together, in place."""
    import onnx_ir as ir
    import onnx_ir.passes.common as passes

    passes.ShapeInferencePass()(model)  # not all shapes inside of what was one operator of torch are known
    for value in (each for node in model.graph for each in node.outputs if each.shape is not None):
        value.shape = ir.Shape(list(value.shape))  # the pass leaves shapes that cannot be changed
    mover = _Mover(model.graph)
    for node in list(model.graph):
        found = _selection(node)
        if found is None or len(found.places) >= found.value.shape[found.axis] or node.outputs[0].is_graph_output():
            continue
        moved = mover.moved(found)
        if moved is not None:
            node.outputs[0].replace_all_uses_with(moved)


class _Mover:
    """Makes the nodes of moved selections, each once."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._known: dict[_Selection, Any] = {}
        self._depth = 0

    def moved(self, wanted: _Selection) -> Any:
        """A value equal to the selection that depends on the selected units only, or None."""
        if wanted not in self._known:
            if self._depth == _DEEPEST:
                return None
            self._depth += 1
            self._known[wanted] = self._found(wanted)
            self._depth -= 1
        return self._known[wanted]

    def _found(self, wanted: _Selection) -> Any:
        value, axis, places = wanted
        if value.shape is None or not isinstance(value.shape[axis], int):
            return None
        if places == tuple(range(value.shape[axis])):
            return value
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx") or len(node.outputs) > 1:
            return None
        inner = _selection(node)
        if inner is not None:
            same = inner.axis == axis
            return self.moved(inner._replace(places=tuple(inner.places[k] for k in places))) if same else None
        if node.op_type == "Concat":
            return self._pieces(node, wanted)
        if node.op_type in _ELEMENTWISE:
            return self._made(node, [self._part(each, wanted) for each in node.inputs], wanted)
        if node.op_type in _POOLS and axis == 1:
            return self._made(node, [self._part(node.inputs[0], wanted), *node.inputs[1:]], wanted)
        if node.op_type == "ReduceMean":
            return self._averaged(node, wanted)
        return self._flattened(node, wanted) if node.op_type == "Reshape" else None

    def _part(self, value: Any, wanted: _Selection) -> Any:
        """The same places of an operand; what is the same for all units stays whole."""
        if value is None or value.shape is None:
            return None
        axis = wanted.axis - len(wanted.value.shape) + len(value.shape)  # operands are aligned at their last axes
        if axis < 0 or value.shape[axis] == 1:
            return value
        return self.moved(_Selection(value, axis, wanted.places))

    def _pieces(self, node: Any, wanted: _Selection) -> Any:
        """Of parts side by side, those that hold the places."""
        if node.attributes["axis"].value % len(wanted.value.shape) != wanted.axis:
            return None
        if not all(each.shape is not None and isinstance(each.shape[wanted.axis], int) for each in node.inputs):
            return None
        ends = np.cumsum([each.shape[wanted.axis] for each in node.inputs])
        owners = np.searchsorted(ends, wanted.places, side="right")
        starts = [0, *(1 + np.flatnonzero(np.diff(owners))), len(owners)]
        pieces = []
        for first, last in itertools.pairwise(starts):
            part = node.inputs[owners[first]]
            before = int(ends[owners[first]]) - part.shape[wanted.axis]
            piece = _Selection(part, wanted.axis, tuple(int(k) - before for k in wanted.places[first:last]))
            pieces.append(self.moved(piece) or self._gathered(node, piece))
        return pieces[0] if len(pieces) == 1 else self._new(node, "Concat", pieces, wanted, axis=wanted.axis)

    def _gathered(self, node: Any, wanted: _Selection) -> Any:
        """The selection itself, of one of the parts that the node puts together."""
        places = self._constant(np.array(wanted.places, np.int64))
        return self._new(node, "Gather", [wanted.value, places], wanted, axis=wanted.axis)

    def _averaged(self, node: Any, wanted: _Selection) -> Any:
        """Over axes behind that of the units, so that this one keeps its number."""
        x, axes = node.inputs[0], _constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if axes is None or x.shape is None or not axes.size or (axes % len(x.shape)).min() <= wanted.axis:
            return None
        return self._made(node, [self.moved(_Selection(x, wanted.axis, wanted.places)), *node.inputs[1:]], wanted)

    def _flattened(self, node: Any, wanted: _Selection) -> Any:
        """[n, units, *positions] -> [n, units * positions], of which all positions of some units are selected."""
        shape = node.inputs[0].shape
        if wanted.axis != 1 or len(wanted.value.shape) != 2 or shape is None or len(shape) < 3:
            return None
        sizes = shape[1:]
        if not all(isinstance(size, int) for size in sizes) or math.prod(sizes) != wanted.value.shape[1]:
            return None
        times = math.prod(sizes[1:])
        units = np.array(wanted.places[::times]) // times
        if tuple((units[:, None] * times + np.arange(times)).ravel()) != wanted.places:
            return None
        part = self.moved(_Selection(node.inputs[0], 1, tuple(units.tolist())))
        flat = self._constant(np.array([0, len(wanted.places)], np.int64))  # 0: as many as there are
        return None if part is None else self._new(node, "Reshape", [part, flat], wanted)

    def _made(self, node: Any, inputs: Sequence[Any], wanted: _Selection) -> Any:
        """The node with other inputs, if all of them could be found."""
        if any(new is None and old is not None for new, old in zip(inputs, node.inputs, strict=True)):
            return None
        attributes = {name: each.value for name, each in node.attributes.items()}
        return self._new(node, node.op_type, inputs, wanted, **attributes)

    def _new(self, before: Any, kind: str, inputs: Sequence[Any], wanted: _Selection, **attributes: Any) -> Any:
        """A node in front of another one; what it gives is the selection."""
        import onnx_ir as ir

        node = ir.node(kind, inputs, attributes)
        self._graph.insert_before(before, node)
        sizes = list(wanted.value.shape)
        sizes[wanted.axis] = len(wanted.places)
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(sizes), wanted.value.type
        return node.outputs[0]

    def _constant(self, numbers: np.ndarray) -> Any:
        import onnx_ir as ir

        name = f"places_{len(self._graph.initializers)}"
        value = ir.Value(name=name, const_value=ir.tensor(numbers, name=name), shape=ir.Shape(numbers.shape))
        value.type = ir.TensorType(ir.DataType.INT64)
        self._graph.register_initializer(value)
        return value


def _selection(node: Any) -> _Selection | None:
    """What a `Slice` or `Gather` with constant places along one axis takes."""
    if node.op_type not in ("Slice", "Gather") or node.domain not in ("", "ai.onnx"):
        return None
    value, *rest = node.inputs
    given = [_constant(each) for each in rest]
    numbers = [each for each in given if each is not None and each.ndim == 1]
    if value is None or value.shape is None or len(numbers) < len(given):
        return None
    taken: np.ndarray | slice
    if node.op_type == "Gather":
        axis, taken = node.attributes["axis"].value if "axis" in node.attributes else 0, numbers[0]
    elif len(numbers) < 3 or numbers[0].size != 1:
        return None
    else:
        start, end, axis, *step = (int(each[0]) for each in numbers)
        taken = slice(start, end, *step)
    size = value.shape[axis]
    if not isinstance(size, int):
        return None
    return _Selection(value, axis % len(value.shape), tuple(np.arange(size)[taken].tolist()))


def _constant(value: Any) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()
