"""What the analysis found: the layers of a network, and the spaces of units that may be re-ordered.

A *space* is a set of units that may change places among each other, together with every axis of every tensor on
which they lie: the rows of the layer that computes them, the columns of all that read them, batch-norm and so on
(design 2.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from taskzip.graph._reach import UNREACHED
from taskzip.graph._scales import Norm, Powers
from taskzip.graph._units import Ids
from taskzip.graph.printing import table

Factors = tuple[np.ndarray | None, ...]
"""By what to multiply the entries of a tensor along each of its axes."""

OUTPUT = "an output of the network"
"""Why the rows of an output layer are pinned."""


@dataclass(frozen=True)
class BatchNormNames:
    """The tensors of a batch-norm that directly follows a layer, and its epsilon; some have no weight."""

    mean: str
    variance: str
    eps: float
    weight: str | None = None


@dataclass(frozen=True)
class NormReader:
    """A layer that reads what a batch-norm gives: per input, of which channel it comes, -1 where of none."""

    layer: str
    channels: np.ndarray


@dataclass(frozen=True)
class NormReaders:
    """What stands behind a batch-norm, wherever it stands itself.

    Attributes:
        name: the path of its module.
        readers: the layers that could take its scale and shift over: nothing else reads it, and what stands between
            gives the same before as behind it.
        obstacle: why there are none, or "".
        no_shift, positive: why that needs a shift of 0 and scales above 0, or "".
    """

    name: str
    readers: tuple[NormReader, ...]
    obstacle: str
    no_shift: str
    positive: str


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
        beside: the spaces along the other axes of what it reads: what it is applied to, sample by sample and unit by
            unit, lies in their order (token mixing).
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
    beside: tuple[int, ...] = ()

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
    """Units that may change places.

    Attributes:
        units: their ids, in the order in which they lie at present.
        wholes: the number of the whole to which each belongs, from 0, all of one size; None where all units may move
            freely. Wholes change places with each other (the groups of a group-norm), and units inside of a whole.
    """

    units: Ids
    wholes: np.ndarray | None = None

    def positions(self, ids: Ids) -> np.ndarray:
        """Where the units lie along an axis: [units, times each unit occurs], empty where they do not."""
        order = np.argsort(self.units)
        slots = order[np.searchsorted(self.units, ids, sorter=order).clip(max=len(order) - 1)]
        here = np.flatnonzero(self.units[slots] == ids)
        return here[np.argsort(slots[here], kind="stable")].reshape(len(order), -1)

    def allowed(self, order: Sequence[int] | np.ndarray) -> np.ndarray:
        """The order nearest to the one wanted in which wholes keep together: that of the first unit of each whole."""
        wanted = np.asarray(order)
        if self.wholes is None:
            return wanted
        places = np.argsort(self.wholes, kind="stable").reshape(1 + self.wholes.max(), -1)  # [wholes, units of each]
        rank = np.argsort(wanted)[places]
        units = np.take_along_axis(places, np.argsort(rank, axis=1), axis=1)[np.argsort(rank.min(axis=1))]
        found = np.empty_like(wanted)
        found[places[np.argsort(places[:, 0])]] = units
        return found


@dataclass(frozen=True)
class Scales:
    """Which units may be made larger or smaller, and what that does to the tensors of the network.

    Attributes:
        free: per space, whether its units may.
        powers: per parameter or buffer, per axis, by which power of its units' scales it is multiplied.
        norms: the batch-norms behind which units may.
    """

    free: tuple[bool, ...]
    powers: Powers
    norms: tuple[Norm, ...]


@dataclass(frozen=True)
class Rest:
    """A parameter that is no weight or bias of a layer.

    Attributes:
        name: of the parameter.
        shape: of the parameter.
        said: what becomes of it, and why it is not shared.
    """

    name: str
    shape: tuple[int, ...]
    said: str


@dataclass(frozen=True)
class Structure:
    """The layers of a network in the order in which they run, its spaces, and the axes of its tensors.

    Attributes:
        axes: per parameter or buffer, per axis, the unit of each index or None.
        scales: which units may be made larger or smaller.
        unreached: the parameters and buffers that no call of the network reached.
        rest: the parameters that are no weight or bias of a layer.
        norms: what reads each batch-norm.
    """

    layers: tuple[Layer, ...]
    spaces: tuple[Space, ...]
    axes: dict[str, tuple[Ids | None, ...]] = field(repr=False)
    scales: Scales = field(default_factory=lambda: Scales((), {}, ()), repr=False)
    unreached: tuple[str, ...] = ()
    rest: tuple[Rest, ...] = ()
    norms: tuple[NormReaders, ...] = field(default=(), repr=False, kw_only=True)

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
        """Put unit `order[k]` of a space into place k, in every tensor of `model` on which the space lies.

        Where units keep together in wholes, in the nearest order that is allowed (`Space.allowed`).
        """
        order = self.spaces[space].allowed(order)
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, axes in self.axes.items():
            for dim, ids in enumerate(axes):
                if ids is None or name not in tensors:
                    continue
                positions = self.spaces[space].positions(ids)
                if positions.size:
                    index = np.arange(len(ids))
                    index[positions.ravel()] = positions[order].ravel()
                    _permute(tensors[name], dim, index)

    def rescale(self, model: nn.Module, scales: Mapping[int, np.ndarray]) -> None:
        """Make units larger, per space unit k of it `scale[k]` > 0 times; `model` computes what it did.

        The scales of the spaces must be free.
        """
        if not scales:
            return
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, factors in self.factors(scales, tensors).items():
            multiply(tensors[name], factors)

    def factors(self, scales: Mapping[int, np.ndarray], tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
        """Per tensor, per axis: by what `rescale` multiplies it; of `tensors` the variances of batch-norms are read."""
        found = {name: self._factors_of(name, scales) for name in self.scales.powers}
        for norm in self.scales.norms:  # a batch-norm divides by the root of the variance and epsilon
            (grown,) = found.get(norm.variance, (None,))
            if grown is not None:
                variance = tensors[norm.variance].detach().double().cpu().numpy()
                found[norm.weight] = (np.sqrt((variance * grown + norm.eps) / (variance + norm.eps)),)
        return {name: factors for name, factors in found.items() if any(each is not None for each in factors)}

    def _factors_of(self, name: str, scales: Mapping[int, np.ndarray]) -> Factors:
        return tuple(
            None if ids is None or not power else self._along(ids, scales, power)
            for ids, power in zip(self.axes[name], self.scales.powers[name], strict=True)
        )

    def _along(self, ids: Ids, scales: Mapping[int, np.ndarray], power: int) -> np.ndarray | None:
        """The scale of every unit of an axis to a power, or None where none of them is scaled."""
        found = None
        for space, scale in scales.items():
            if (positions := self.spaces[space].positions(ids)).size:
                found = np.ones(len(ids)) if found is None else found
                found[positions] = scale[:, None] ** power
        return found

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
        for wholes in [self.spaces[space].wholes for space in layer.spaces]:
            if wholes is not None:
                said.append(f"in {1 + wholes.max()} groups that keep together")
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
        return table(rows, {0: 28, 3: 20, 5: 19}, right=2)


def _permute(tensor: Tensor, dim: int, index: np.ndarray) -> None:
    tensor.data = tensor.data.index_select(dim, torch.from_numpy(index).to(tensor.device))


def multiply(tensor: Tensor, factors: Factors) -> None:
    """Multiply a tensor along its axes, in place, in float64."""
    product = tensor.data.to(torch.promote_types(tensor.dtype, torch.float64))
    for dim, factor in enumerate(factors):
        if factor is not None:
            shape = [-1 if i == dim else 1 for i in range(tensor.dim())]
            product = product * torch.from_numpy(factor).to(tensor.device).reshape(shape)
    tensor.data = product.to(tensor.dtype)


def _reads(structure: Structure, layer: Layer) -> str:
    if layer.columns is None:
        return f"{layer.inputs} inputs" if layer.reads_input else f"{layer.inputs} in fixed order"
    spaces, first, counts = np.unique(structure.space_of(layer.columns), return_index=True, return_counts=True)
    return " + ".join(f"{counts[i]} " + ("fixed" if spaces[i] < 0 else f"of s{spaces[i]}") for i in np.argsort(first))
