"""What the analysis found: the layers of a network, and the spaces of units that may be re-ordered.

A *space* is a set of units that may change places among each other, together with every axis of every tensor on
which they lie: the rows of the layer that computes them, the columns of all that read them, batch-norm and so on
(design 2.2).
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor, nn

from taskzip.graph._reach import UNREACHED
from taskzip.graph._units import Ids

_WIDTH = 100  # columns of the printed table


OUTPUT = "an output of the network"
"""Why the rows of an output layer are pinned."""


@dataclass(frozen=True)
class BatchNormNames:
    """The tensors of a batch-norm that directly follows a layer, and its epsilon."""

    mean: str
    variance: str
    eps: float


@dataclass(frozen=True)
class Layer:
    """One weight that a linear layer or a convolution reads.

    Attributes:
        name: the name of the weight without ".weight".
        weight, bias: names of the parameters.
        kind: "linear", "conv1d", "conv2d" or "conv3d".
        units, inputs: rows and columns of the weight (for a convolution: kernels and input channels).
        kernel: the taps, `()` for a linear layer.
        calls: how many times one forward pass uses the weight.
        rows: per row, the unit that it computes; a unit may be many rows (an attention head).
        spaces: the spaces in which its rows lie; none where they cannot be shared.
        columns: per input, the unit that it reads, or None where the inputs are in a fixed order.
        reads_input: whether its inputs are those of the network, in a fixed order.
        pinned: why none of the rows can be shared, or "".
        solvable: whether a unit reads all inputs, so that least squares can solve for its weights.
        batch_norm: the batch-norm that is all that reads this layer, if any.
    """

    name: str
    weight: str
    bias: str | None
    kind: str
    units: int
    inputs: int
    kernel: tuple[int, ...]
    calls: int
    rows: Ids
    spaces: tuple[int, ...]
    columns: Ids | None
    reads_input: bool
    pinned: str
    solvable: bool = True
    batch_norm: BatchNormNames | None = None

    @property
    def form(self) -> str:
        """Its kind and kernel, for a person."""
        return f"{self.kind} {'x'.join(map(str, self.kernel))}".strip()

    @property
    def taps(self) -> int:
        """Weights per input: k * k for a k x k kernel, 1 for a linear layer."""
        return int(np.prod(self.kernel, dtype=int))


@dataclass(frozen=True)
class Space:
    """Units that may change places: their ids, in the order in which they lie at present."""

    units: Ids

    def positions(self, ids: Ids) -> np.ndarray:
        """Where the units lie along an axis: [units, times each unit occurs], empty where they do not."""
        order = np.argsort(self.units)
        slots = order[np.searchsorted(self.units, ids, sorter=order).clip(max=len(order) - 1)]
        here = np.flatnonzero(self.units[slots] == ids)
        return here[np.argsort(slots[here], kind="stable")].reshape(len(order), -1)


@dataclass(frozen=True)
class Structure:
    """The layers of a network in the order in which they run, its spaces, and the axes of its tensors.

    Attributes:
        axes: per parameter or buffer, per axis, the unit of each index or None.
        unreached: the parameters and buffers that no call of the network reached.
    """

    layers: tuple[Layer, ...]
    spaces: tuple[Space, ...]
    axes: dict[str, tuple[Ids | None, ...]] = field(repr=False)
    unreached: tuple[str, ...] = ()

    def layer(self, name: str) -> Layer:
        """The layer of that name."""
        return next(layer for layer in self.layers if layer.name == name)

    def space_of(self, columns: Ids) -> np.ndarray:
        """Per column, the space that it reads, or -1 for a unit that never moves."""
        found = np.full(len(columns), -1, np.int64)
        for index, space in enumerate(self.spaces):
            found[np.isin(columns, space.units)] = index
        return found

    def reorder(self, model: nn.Module, space: int, order: Sequence[int] | np.ndarray) -> None:
        """Put unit `order[k]` of a space into place k, in every tensor of `model` on which the space lies."""
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, axes in self.axes.items():
            for dim, ids in enumerate(axes):
                if ids is None or name not in tensors:
                    continue
                positions = self.spaces[space].positions(ids)
                if positions.size:
                    index = np.arange(len(ids))
                    index[positions.ravel()] = positions[np.asarray(order)].ravel()
                    _permute(tensors[name], dim, index)

    def parts(self, layer: Layer) -> dict[int, np.ndarray]:
        """The rows of a layer by the space in which they lie: [units, rows of each unit]."""
        return {space: self.spaces[space].positions(layer.rows) for space in layer.spaces}

    def sharing(self, layer: Layer) -> str:
        """Whether a layer can be shared, for a person: yes, in part, as heads, or why not."""
        if layer.pinned:
            return layer.pinned
        said = []
        for part in self.parts(layer).values():
            whole = len(layer.spaces) == 1 and part.size == layer.units
            if part.shape[1] > 1:
                said.append(f"{part.shape[0]} units of {part.shape[1]} rows")
            elif not whole:
                said.append(f"{part.shape[0]} units")
        free = sum(part.size for part in self.parts(layer).values())
        if free < layer.units:
            said.append(f"{layer.units - free} fixed")
        return ", ".join(["yes", *said])

    def unreached_in_words(self) -> str:
        """What no call reached, which layers stay as they are for that, and the way out; "" if all was reached."""
        if not self.unreached:
            return ""
        kept = [layer.name for layer in self.layers if layer.pinned.endswith(UNREACHED)]
        stays = f", and {', '.join(kept)} cannot be shared, for their units may be read there" if kept else ""
        return (
            f"no call reaches {', '.join(self.unreached)}{stays}. Call every part in `forward(model, batch)`, or "
            f"remove those that are not needed: parts outside the call are not followed."
        )

    def __str__(self) -> str:
        rows = [("layer", "kind", "units", "reads", "space", "shareable")]
        for layer in self.layers:
            spaces = " ".join(f"s{space}" for space in layer.spaces) or "-"
            rows.append((layer.name, layer.form, str(layer.units), _reads(self, layer), spaces, self.sharing(layer)))
        return _table(rows)


def _permute(tensor: Tensor, dim: int, index: np.ndarray) -> None:
    tensor.data = tensor.data.index_select(dim, torch.from_numpy(index).to(tensor.device))


def _reads(structure: Structure, layer: Layer) -> str:
    if layer.columns is None:
        return f"{layer.inputs} inputs" if layer.reads_input else f"{layer.inputs} in fixed order"
    spaces, first, counts = np.unique(structure.space_of(layer.columns), return_index=True, return_counts=True)
    return " + ".join(f"{counts[i]} " + ("fixed" if spaces[i] < 0 else f"of s{spaces[i]}") for i in np.argsort(first))


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Two spaces between columns; a cell that is too wide goes on in the next line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for wide, most in ((0, 28), (3, 20), (5, 19)):
        widths[wide] = min(widths[wide], max(most, _WIDTH - 10 - sum(widths) + widths[wide]))
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, width, break_on_hyphens=False) for cell, width in zip(row, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            padded = [part.ljust(width) for part, width in zip(parts, widths, strict=True)]
            padded[2] = parts[2].rjust(widths[2])
            lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
