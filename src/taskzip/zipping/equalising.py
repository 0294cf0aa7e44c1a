"""Units brought to sizes that compare, where the network computes the same with any.

ReLU, pooling, sums and convolutions commute with positive scaling, so that how large activations are between them is
an accident of training: units f times as large, read with 1/f of the weights, are the same network. Curvatures,
differences and ridges are not the same; units that happen to be large would rule the merged weights.

How large a unit is, is told by weights alone, so that equal units of two networks stay equal, whatever their data: the
norm of its incoming weights, each in terms of how large the unit is that it reads; the scale of batch-norm behind it.
How much varies what the networks are given, all of them have in common.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from taskzip.graph import Layer, Structure

_LEAST = 1e-3
"""Units are scaled by no less than this, relative to the root mean square over their space."""


class Sizes(NamedTuple):
    """What is known of the units of a network whose sizes were made equal.

    Attributes:
        scales: per space whose units were scaled, how many times as large each of them was made.
        matters: per space, by how much what reads a unit changes when the unit does, relative to the readers' sizes;
            with a root mean square of 1 over the units.
        rows: per layer, how large each row is now.
    """

    scales: dict[int, np.ndarray]
    matters: dict[int, np.ndarray]
    rows: dict[str, np.ndarray]

    @classmethod
    def unknown(cls) -> Sizes:
        """Of a network that was left as it was."""
        return cls({}, {}, {})

    def reorder(self, space: int, order: np.ndarray) -> None:
        """The units of a space were put into another order."""
        for each in (self.scales, self.matters):
            if space in each:
                each[space] = each[space][order]


def equalise(network: nn.Module, structure: Structure, variances: Mapping[str, np.ndarray]) -> Sizes:
    """Give every unit whose scale is free the size 1, in place.

    The square of a residual stream's unit is the sum over all layers that write into it. In half precision scales are
    powers of two, so that no weight is rounded.

    Args:
        network: computes the same afterwards.
        structure: of the network.
        variances: of each input of the layers that read what the network is given, by their names.
    """
    sizes, free = _Squares(network, structure, variances), structure.scales.free
    scales = {s: _floored(squares) ** -0.5 for s, squares in sizes.spaces.items() if free[s] and squares.any()}
    if any(p.dtype.itemsize < 4 for p in network.parameters()):
        scales = {space: np.exp2(np.round(np.log2(scale))) for space, scale in scales.items()}
    matters = {space: _relative(squares) for space, squares in sizes.read(scales).items()}
    rows = {layer.name: _floored(squares) ** 0.5 for layer, squares in sizes.rows(scales)}
    structure.rescale(network, scales)
    return Sizes(scales, matters, rows)


def restored(scales: Sequence[np.ndarray], slots: Sequence[np.ndarray]) -> list[np.ndarray]:
    """By how much to scale units back once nothing is compared any more: to where they were, which quantisers expect.

    Units of several tasks in one slot become as large as they were in the geometric mean.

    Args:
        scales: per task, how many times as large each unit was made.
        slots: per task, the slot of each unit.
    """
    everywhere = np.concatenate(list(slots))
    total = np.bincount(everywhere, np.log(np.concatenate(list(scales)))) / np.maximum(np.bincount(everywhere), 1)
    return [np.exp(-total[each]) for each in slots]


def _relative(squares: np.ndarray) -> np.ndarray:
    """Their roots, with a root mean square of 1."""
    return _floored(squares / squares.mean()) ** 0.5 if squares.any() else np.ones_like(squares)


def _floored(squares: np.ndarray) -> np.ndarray:
    return np.maximum(squares, _LEAST**2 * squares.mean() + np.finfo(float).tiny)


class _Squares:
    """The squared sizes of units, layer by layer in the order in which they run.

    Attributes:
        spaces: per space that a layer writes, the square of each unit.
    """

    def __init__(self, network: nn.Module, structure: Structure, variances: Mapping[str, np.ndarray]) -> None:
        self._network, self._structure, self._variances = network, structure, variances
        self.spaces: dict[int, np.ndarray] = {}
        self._rows: dict[str, np.ndarray] = {}  # per layer, the square of each row
        self._inputs: dict[str, np.ndarray] = {}  # and of each input, as it was when the layer ran
        for layer in structure.layers:
            self._add(layer)

    def _add(self, layer: Layer) -> None:
        parts = self._structure.parts(layer)
        if self._network.get_parameter(layer.weight).is_complex() or (_grouped(layer) and parts.keys() & self.spaces):
            return  # a grouped convolution passes units on that are known already
        squares = self._squares(layer)
        inputs = self._inputs[layer.name] = self._input_squares(layer)
        norm = layer.batch_norm
        if norm is None or norm.weight is None:
            rows = _product(squares, inputs)
        else:
            rows = self._network.get_parameter(norm.weight).detach().double().square().cpu().numpy()
        self._rows[layer.name] = rows
        for space, places in parts.items():
            self.spaces[space] = self.spaces.get(space, 0) + rows[places].mean(1)

    def _squares(self, layer: Layer) -> Tensor:
        """The squared weights of a layer, summed over the taps: [units, inputs]."""
        weight = self._network.get_parameter(layer.weight).detach()
        return (
            weight.reshape(layer.units, layer.inputs, -1)
            .to(torch.promote_types(weight.dtype, torch.float32))
            .square()
            .sum(2)
        )

    def _input_squares(self, layer: Layer) -> np.ndarray:
        """The square of each input as far as it is known, else 1."""
        found = self._variances.get(layer.name, np.ones(layer.inputs)).copy()
        for space, places in self._read(layer).items():
            found[places] = self.spaces[space][:, None]
        return found

    def _read(self, layer: Layer) -> dict[int, np.ndarray]:
        """The sized spaces that a layer reads, and the inputs in which each unit lies: [units, times]."""
        if layer.columns is None or _grouped(layer):
            return {}
        found = {space: self._structure.spaces[space].positions(layer.columns) for space in self.spaces}
        return {space: places for space, places in found.items() if places.size}

    def rows(self, scales: Mapping[int, np.ndarray]) -> Iterator[tuple[Layer, np.ndarray]]:
        """The layers whose rows have a known size, and the squares of these once their spaces are scaled."""
        for layer in self._structure.layers:
            if layer.name in self._rows:
                found = self._rows[layer.name].copy()
                for space, own in self._structure.parts(layer).items():
                    found[own] *= scales[space][:, None] ** 2 if space in scales else 1
                yield layer, found

    def read(self, scales: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Per space, the square of what each unit is multiplied by where it is read, relative to its readers' sizes.

        Summed over the layers, each of which counts by what its rows are.
        """
        total = {space: np.zeros(len(squares)) for space, squares in self.spaces.items()}
        for layer, rows in self.rows(scales):
            squares = self._squares(layer)
            weights = rows / np.maximum(_product(squares, self._inputs[layer.name]), np.finfo(float).tiny)
            found = _product(squares.T, weights) / max(rows.sum(), np.finfo(float).tiny)
            for space, places in self._read(layer).items():
                total[space] += found[places].sum(1) / scales.get(space, np.ones(1)) ** 2
        return total


def _grouped(layer: Layer) -> bool:
    """Whether its units read a part of the inputs, for example their own."""
    return layer.columns is not None and len(layer.columns) != layer.inputs


def _product(matrix: Tensor, vector: np.ndarray) -> np.ndarray:
    return (matrix @ torch.from_numpy(vector).to(matrix)).double().cpu().numpy()
