"""Units brought to sizes that compare, where the network computes the same with any.

ReLU, pooling, sums and convolutions commute with positive scaling, so that how large activations are between them is
an accident of training: units f times as large, read with 1/f of the weights, are the same network. Curvatures,
differences and ridges are not the same; units that happen to be large would rule the merged weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import nn

from taskzip.curvature import Moments
from taskzip.graph import Layer, Structure

_LEAST = 1e-3
"""Units are scaled by no less than this, relative to the root mean square over their space."""


class Units(NamedTuple):
    """The units of a space: how much each matters to what reads it, and how many times as large it was made."""

    matters: np.ndarray
    scale: np.ndarray

    def ordered(self, order: np.ndarray) -> Units:
        """In another order."""
        return Units(self.matters[order], self.scale[order])


def equalise(network: nn.Module, structure: Structure, moments: Mapping[str, Moments]) -> dict[int, Units]:
    """Give every unit whose scale is free the spread 1, in place.

    The spread is that of what the unit's layer answers, or batch-norm right behind it; of a residual stream's unit, the
    root of the summed variances of all layers that write into it. In half precision scales are powers of two, so that
    no weight is rounded.

    Args:
        network: computes the same afterwards.
        structure: of the network.
        moments: per layer, mean and variance of its answers; what has none (complex numbers) is left out.

    Returns:
        Per space whose units were scaled, by how much, and how much each of them matters: what it gives to the layers
        that read it, relative to the spread of these, with a root mean square of 1 over the units.
    """
    sizes = _Sizes(network, structure, moments)
    variances = {space: sizes.variance(space) for space, free in enumerate(structure.scales.free) if free}
    scales = {space: _floored(variance) ** -0.5 for space, variance in variances.items() if variance.any()}
    if any(p.dtype.itemsize < 4 for p in network.parameters()):
        scales = {space: np.exp2(np.round(np.log2(scale))) for space, scale in scales.items()}
    importance = {space: sizes.read(space, scales) / scale**2 for space, scale in scales.items()}
    structure.rescale(network, scales)
    return {space: Units(_relative(each), scales[space]) for space, each in importance.items()}


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
    return np.maximum(squares, _LEAST**2 * squares.mean())


class _Sizes:
    """How large units are, and with which weights they are read; behind batch-norm, where that follows a layer."""

    def __init__(self, network: nn.Module, structure: Structure, moments: Mapping[str, Moments]) -> None:
        self._structure = structure
        self._tensors = dict(network.named_parameters()) | dict(network.named_buffers())
        self._layers = [layer for layer in structure.layers if layer.name in moments]
        self._gain = {layer.name: self._gain_of(layer) for layer in self._layers}
        self._variance = {
            layer.name: moments[layer.name][1].double().cpu().numpy() * self._gain[layer.name] ** 2
            for layer in self._layers
        }

    def variance(self, space: int) -> np.ndarray:
        """Of each unit, summed over the layers that write it (a residual stream has several)."""
        total = np.zeros(len(self._structure.spaces[space].units))
        for layer in self._layers:
            if space in layer.spaces:
                total += self._variance[layer.name][self._structure.parts(layer)[space]].mean(1)
        return total

    def read(self, space: int, scales: Mapping[int, np.ndarray]) -> np.ndarray:
        """The squared weights with which each unit is read, relative to the variance of what reads it."""
        total = np.zeros(len(self._structure.spaces[space].units))
        for layer in self._layers:
            if layer.columns is None or len(layer.columns) != layer.inputs:  # a grouped convolution reads its own units
                continue
            places = self._structure.spaces[space].positions(layer.columns)
            size = np.ones(layer.units)
            for other, rows in self._structure.parts(layer).items():
                size[rows] = scales[other][:, None] if other in scales else 1
            spread = float((self._variance[layer.name] * size**2).sum())
            if places.size and spread:
                weight = self._number(layer.weight).reshape(layer.units, layer.inputs, -1)
                weight = weight * (self._gain[layer.name] * size)[:, None, None]
                total += (weight**2).sum((0, 2))[places].sum(1) / spread
        return total

    def _gain_of(self, layer: Layer) -> np.ndarray | float:
        norm = layer.batch_norm
        if norm is None:
            return 1.0
        gain = 1.0 if norm.weight is None else np.abs(self._number(norm.weight))
        return gain / np.sqrt(self._number(norm.variance) + norm.eps)

    def _number(self, name: str) -> np.ndarray:
        return self._tensors[name].detach().double().cpu().numpy()
