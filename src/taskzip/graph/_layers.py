"""From what the graph said of units to layers and spaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from taskzip.graph._nodes import arguments, op_name
from taskzip.graph._units import PINNED, Ids
from taskzip.graph._values import Call, Context, shape_of
from taskzip.graph.structure import BatchNormNames, Layer, Space, Structure


class Reading:
    """The conclusions from one walk through a graph.

    Args:
        c: what was collected on the way.
        parameters: the names of the network's parameters; only these can be a layer's weight and bias.
    """

    def __init__(self, c: Context, parameters: set[str]) -> None:
        self._c = c
        self._parameters = parameters
        self._units = c.units.settle()
        self._axes = {
            name: tuple(None if ids is None else self._units.roots(ids) for ids in axes)
            for name, axes in c.parameters.items()
        }
        self._uses: dict[str, list[Call]] = {}  # by weight, in the order in which the layers run
        for call in c.calls:
            weight = self._parameter(call.weight)
            if weight is not None:
                self._uses.setdefault(weight, []).append(call)
        self._readers: dict[str, list[Node]] = {}
        for node, name in c.names.items():
            self._readers.setdefault(name, []).extend(node.users)

    def structure(self, unreached: Sequence[str] = ()) -> Structure:
        """The layers, the spaces, and the axes on which these lie.

        Args:
            unreached: the parameters that no call reached.
        """
        spaces, space_of = self._spaces()
        layers = [self._layer(weight, space_of) for weight in self._uses]
        return Structure(tuple(layers), spaces, self._axes, tuple(unreached))

    def _spaces(self) -> tuple[tuple[Space, ...], dict[int, int]]:
        """The classes of more than one unit that can move, numbered in the order of the layers that compute them."""
        spaces: list[Space] = []
        space_of: dict[int, int] = {}
        rows = [self._rows(weight) for weight in self._uses]
        for ids in rows + [ids for axes in self._axes.values() for ids in axes if ids is not None]:
            units = ids[np.sort(np.unique(ids, return_index=True)[1])]
            kinds = self._units.classes(units)
            for kind, count in zip(*np.unique(kinds, return_counts=True), strict=True):
                if kind != PINNED and count > 1 and kind not in space_of:
                    space_of[int(kind)] = len(spaces)
                    spaces.append(Space(units[kinds == kind]))
        return tuple(spaces), space_of

    def _layer(self, weight: str, space_of: dict[int, int]) -> Layer:
        uses = self._uses[weight]
        first = uses[0]
        units, inputs, *kernel = shape_of(first.weight)
        columns = None if first.reads is None else self._units.roots(first.reads)
        entangled = self._entangled(weight) or self._complex(uses)
        pinned = entangled or self._pinned(weight, space_of)
        return Layer(
            name=weight.removesuffix(".weight"),
            weight=weight,
            bias=self._parameter(first.bias),
            kind=first.kind,
            units=units,
            inputs=inputs,
            kernel=tuple(kernel),
            calls=len(uses),
            rows=self._rows(weight),
            spaces=() if pinned else tuple(space_of[kind] for kind in self._kinds(weight) if kind in space_of),
            columns=columns,
            reads_input=all(call.raw for call in uses) and columns is None,
            pinned=pinned,
            solvable=first.groups == 1 and not entangled,
            batch_norm=self._batch_norm(uses),
        )

    def _entangled(self, weight: str) -> str:
        """How new weights for a layer would change more than its own outputs, or ""."""
        uses = self._uses[weight]
        bias = self._parameter(uses[0].bias)
        if any(self._parameter(call.bias) != bias for call in uses):
            return "its calls add different biases"
        if uses[0].bias is not None and bias is None:
            return "its bias is not a parameter"
        for name in filter(None, (weight, bias)):
            for reader in self._readers[name]:
                if not any(reader is call.node for call in uses):
                    return f"its {'weight' if name == weight else 'bias'} is also read by {self._describe(reader)}"
        return ""

    def _complex(self, uses: Sequence[Call]) -> str:
        """Curvatures and least squares are of real numbers."""
        nodes = [node for call in uses for node in (call.node, *call.node.all_input_nodes)]
        return "complex numbers" if any(node.meta["val"].is_complex() for node in nodes) else ""

    def _pinned(self, weight: str, space_of: Mapping[int, int]) -> str:
        """Why none of the units of a layer can be paired with another network's, or ""."""
        rows, kinds = self._rows(weight), self._kinds(weight)
        if len(rows) == 0:
            return "a single unit"
        if self._uses[weight][0].groups > 1:
            return "a grouped convolution"
        if any(kind in space_of for kind in kinds):
            return ""
        return self._units.reason(rows) or "its units move only together"

    def _batch_norm(self, uses: list[Call]) -> BatchNormNames | None:
        """The batch-norm over a layer's units, if that is all that reads them and its statistics can be set."""
        node = uses[0].node
        norm = self._c.norms.get(node)
        units_on = node.meta["val"].dim() - len(shape_of(uses[0].weight)) + 1
        if len(uses) > 1 or norm is None or len(node.users) > 1 or units_on != 1:
            return None
        a = arguments(norm)
        mean, variance = (self._c.names.get(a[name]) for name in ("running_mean", "running_var"))
        if a["training"] or mean is None or variance is None:
            return None
        if any(name in self._parameters or len(self._readers[name]) > 1 for name in (mean, variance)):
            return None
        return BatchNormNames(mean, variance, float(a["eps"]))

    def _parameter(self, node: Any) -> str | None:
        name = self._c.names.get(node)
        return name if name in self._parameters else None

    def _rows(self, weight: str) -> Ids:
        rows = self._axes[weight][0]
        return np.empty(0, np.int64) if rows is None else rows

    def _kinds(self, weight: str) -> list[int]:
        kinds, first = np.unique(self._units.classes(self._rows(weight)), return_index=True)
        return kinds[np.argsort(first)].tolist()

    def _describe(self, reader: Node) -> str:
        """The layer of which a node is a call, or else its op."""
        for weight, uses in self._uses.items():
            if any(reader is call.node for call in uses):
                return weight.removesuffix(".weight")
        return op_name(reader)
