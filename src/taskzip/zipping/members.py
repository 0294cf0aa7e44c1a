"""A task while it is being zipped: a working copy of its network, what is known of it, and what it shares so far."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taskzip.algebra import pruned_layers
from taskzip.copying import copy_of, uncompiled
from taskzip.errors import GraphError, InputError, TaskzipWarning
from taskzip.graph import Layer, Structure, analyse
from taskzip.observing import MEMORY, Answers, Forwards, MaxRows, Observer, Order, interleaved, misread
from taskzip.tasks import (
    ROUNDING,
    Batch,
    Kept,
    Task,
    counted_calls,
    evaluating,
    has_numbers,
    run_batch,
    same_outputs,
    tensors,
)
from taskzip.zipped import Fold, fold, foldable, has_own_scale, installed, weights_of
from taskzip.zipping.equalising import Sizes, equalise

log = logging.getLogger("taskzip")

Owners = tuple[int, ...]
"""The tasks that own a unit, by their numbers, ascending."""

Slots = dict[int, tuple[int, np.ndarray]]
"""Per space of a task, its joint space and the slot of each unit: units of two tasks in one slot belong together."""

_SAMPLES = 256
"""So many samples tell how much the inputs of the network vary."""

_FEW = 8
"""So many samples show in which order layers answer."""

_TURNS = (2, 1)
"""So many samples of two batches show whether forwards can run by turns."""


class Member:
    """The state of one task between two layers: plain tensors and numbers only, so that it can be saved and resumed.

    Attributes:
        task: what the caller gave; its model is read, never written.
        number: its place in the caller's list.
        network: the working copy, zipped in place, in eval mode.
        structure: layers and spaces of the network.
        original: the network that `network` should agree with: the caller's, or a copy with batch-norm folded and with
            units of equal sizes.
        folded: the layers that batch-norms were folded into, before or behind them, and these batch-norms.
        unfolded: where folding was wanted, the batch-norms that stay private, and why.
        pruned: the layers whose zeros are missing connections.
        samples: how many samples the calibration data hold.
        slots: per space that has been put into order, the joint space, and in which of its slots each unit stands.
        changed: whether anything upstream may differ from the original network.
        answers: what the original network answers, as far as it is remembered.
        forwards: of the working copy on all batches, as far as the layer that was read last.
        known: the sizes of its units, where they were made equal.
    """

    def __init__(
        self, task: Task, seed: int, *, number: int = 0, fold_batch_norm: bool = False, equal_sizes: bool = False
    ) -> None:
        self.task = replace(task, data=Kept(task.data))
        self.number = number
        self._check_parameters()
        self.samples = task.check_data()
        self.original = uncompiled(task.model)
        self.network = copy_of(self.original).eval()
        batch = next(task.batches())
        with counted_calls(self.network) as self._calls:
            answers = self._first_answers(batch)
        self.structure = self._analyse(batch)
        folds, self.unfolded = foldable(self.network, self.structure) if fold_batch_norm else ([], {})
        self.folded = [(each.layer, each.norm) for each in folds]
        if folds:
            self.original = self._fold(folds, batch, answers)
        weights = {layer.name: self.network.get_parameter(layer.weight) for layer in self.structure.layers}
        self.pruned = pruned_layers(weights)
        self.slots: Slots = {}
        self._orders: dict[int, np.ndarray] = {}  # per space, which of the original's units stands in each place
        self._check_orders(batch, answers, seed, equal_sizes)
        self.changed = False
        self.answers = Answers()
        self.forwards = Forwards(self.task, self.network, self.dense, MEMORY if self._can_wait() else 0)
        self.known = Sizes.unknown()

    def _first_answers(self, batch: Batch) -> Any:
        answers = self._answer(self.network, batch)
        if not tensors(answers):
            raise InputError(
                f"task {self.task.name!r}: its output, a {type(answers).__name__}, holds no tensor: return "
                f"tensors, a dict, a tuple or a dataclass of them, or pick them by Task(forward=...)."
            )
        if any(y.isnan().any() for y in tensors(answers)):
            raise InputError(f"task {self.task.name!r}: the network's own outputs are NaN on the first batch.")
        return answers

    def _check_parameters(self) -> None:
        for name, tensor in self.task.model.state_dict(keep_vars=True).items():
            if nn.parameter.is_lazy(tensor):
                raise InputError(f"task {self.task.name!r}: parameter {name!r} has no shape yet: run the network once.")
            if has_numbers(tensor) and not torch.isfinite(tensor.detach()).all():
                raise InputError(
                    f"task {self.task.name!r}: {name!r} has NaN or infinite values: train or repair the network."
                )

    def _analyse(self, batch: Batch) -> Structure:
        try:
            return analyse(self.network, batch, self.task.run)
        except GraphError as error:
            raise GraphError(f"task {self.task.name!r}: {error}") from error

    def _fold(self, folds: Sequence[Fold], batch: Batch, answers: Any) -> nn.Module:
        """Fold batch-norms in the working copy, and read it again; a copy of it becomes the network to agree with."""
        fold(self.network, folds)
        try:
            self.structure = self._analyse(batch)
        except GraphError as error:
            raise GraphError(f"{error} That is with its batch-norms folded: zip with batch_norm='private'.") from error
        if not self._agrees((), (), batch, answers):
            self._check_steady(batch)
            raise GraphError(
                f"task {self.task.name!r}: with its batch-norms folded the network gives other outputs, so they do "
                f"more than torch's own; zip with batch_norm='private'."
            )
        return copy_of(self.network)

    def _real_layers(self) -> list[Layer]:
        """The layers that compute with real numbers."""
        return [layer for layer in self.structure.layers if not self.network.get_parameter(layer.weight).is_complex()]

    def _check_orders(self, batch: Batch, answers: Any, seed: int, sizes: bool) -> None:
        """Re-order every space at random in a copy of the network: it must still give its own outputs.

        So must it with units of other sizes, if they are to be given equal ones.

        Raises:
            GraphError: it does not, naming the layer whose units were misread.
            InputError: the network gives other outputs each time it runs, whatever the order.
        """
        rng = np.random.default_rng(seed)
        orders = [space.allowed(rng.permutation(len(space.units))) for space in self.structure.spaces]
        free = [space for space, free in enumerate(self.structure.scales.free) if free and sizes]
        scales = {space: 2.0 ** rng.integers(-1, 2, len(orders[space])) for space in free}
        if self._agrees(orders, range(len(orders)), batch, answers, scales):
            self._check_layers(orders, batch)
            return
        self._check_steady(batch)
        for space in range(len(orders)):
            layer = next((x.name for x in self.structure.layers if space in x.spaces), "an unnamed layer")
            if not self._agrees(orders, [space], batch, answers):
                raise GraphError(
                    f"task {self.task.name!r}: re-ordering the units of {layer!r} changes the outputs, so its readers "
                    f"were misunderstood. Please report the architecture; the network cannot be zipped as it is."
                )
            if space in scales and not self._agrees((), (), batch, answers, {space: scales[space]}):
                raise GraphError(
                    f"task {self.task.name!r}: scaling the units of {layer!r} changes the outputs, so its readers "
                    f"were misunderstood. Please report the architecture; compensate='output' leaves units as they are."
                )
        raise GraphError(
            f"task {self.task.name!r}: re-ordering hidden units changes the outputs; please report the network."
        )

    def _check_steady(self, batch: Batch) -> None:
        """Whether the caller's network gives the same outputs when it runs twice."""
        network = copy_of(self.original)
        with evaluating(network):  # around both: buffers, too, are a state that may stay behind
            once, again = (run_batch(self.task, network, batch, 0) for _ in range(2))
        if not same_outputs(once, again):
            raise InputError(
                f"task {self.task.name!r}: the network gives other outputs when it runs twice on one batch in eval "
                f"mode: it draws random numbers (dropout that is always on, sampling) or keeps a state. Make it "
                f"deterministic in eval mode, for zipping compares what it answers."
            )

    def _check_layers(self, orders: Sequence[np.ndarray], batch: Batch) -> None:
        """What each layer answers must lie where zipping looks for it: else least squares is not for that layer.

        Raises:
            GraphError: the units of a layer do not lie there.
        """
        self._orders = dict(enumerate(orders))
        layers = [layer for layer in self._real_layers() if not self._moves_beside(layer)]
        rows = {layer.name: self.original_rows(layer) for layer in layers}
        self._orders = {}
        found = self._misread(orders, layers, rows, batch)
        for name, order in found.items():
            where = f"task {self.task.name!r}, layer {name!r}"
            if order.units:
                raise GraphError(
                    f"{where}: its units stand in another order than was read from the network. Please report the "
                    f"architecture; the network cannot be zipped as it is."
                )
        unsolved = [name for name, order in found.items() if order.rows and self.structure.layer(name).solvable]
        if unsolved:
            warnings.warn(
                f"task {self.task.name!r}: re-ordering hidden units moves what {', '.join(unsolved)} are applied to, "
                f"so that these layers are not solved again by least squares. Please report the architecture.",
                TaskzipWarning,
                stacklevel=2,
            )
        layers = [replace(x, solvable=x.solvable and x.name not in unsolved) for x in self.structure.layers]
        self.structure = replace(self.structure, layers=tuple(layers))

    def _agrees(
        self,
        orders: Sequence[np.ndarray],
        spaces: Sequence[int],
        batch: Batch,
        answers: Any,
        scales: Mapping[int, np.ndarray] | None = None,
    ) -> bool:
        network = self._reordered(orders, spaces)
        self.structure.rescale(network, scales or {})
        return same_outputs(answers, self._answer(network, batch))

    def _can_wait(self) -> bool:
        """Whether forwards of the network that run by turns answer what they answer one after another."""
        whole = list(islice(self.task.batches(), 2))
        few = [_few(batch, samples) for batch, samples in zip(whole, _TURNS, strict=False)]
        try:
            wanted = [self._answer(self.network, batch) for batch in few]
        except Exception:  # the network is made for batches of one size
            few, wanted = whole, [self._answer(self.network, batch) for batch in whole]
        try:
            given = interleaved(self.task, self.network, self.dense, self.structure.layers, few)
        except Exception as error:  # one after another they run: what one needs the other has cleared
            log.debug("%s: by turns its forwards fail: %s", self.task.name, error)
            given = [None]
        if all(each is not None for each in given) and all(
            same_outputs(a, b) for a, b in zip(wanted, given, strict=True)
        ):
            return True
        log.info("%s: its forwards cannot wait for each other, so that each layer takes a new one", self.task.name)
        return False

    def _answer(self, network: nn.Module, batch: Batch) -> Any:
        with evaluating(network):
            return run_batch(self.task, network, batch, 0)

    def _misread(
        self,
        orders: Sequence[np.ndarray],
        layers: Sequence[Layer],
        rows: Mapping[str, Tensor | None],
        batch: Batch,
    ) -> dict[str, Order]:
        networks = (self.original, self._reordered(orders))
        try:
            return misread(self.task, *networks, layers, rows, _few(batch, _FEW), ROUNDING)
        except InputError:  # the network is made for batches of one size
            return misread(self.task, *networks, layers, rows, batch, ROUNDING)

    def _reordered(self, orders: Sequence[np.ndarray], spaces: Sequence[int] | None = None) -> nn.Module:
        """A copy with these spaces, or all of them, in another order."""
        network = copy_of(self.network)
        for space in range(len(orders)) if spaces is None else spaces:
            self.structure.reorder(network, space, orders[space])
        return network

    def _moves_beside(self, layer: Layer) -> bool:
        """Whether units have moved that lie along other axes of what a layer reads."""
        return any(space in self._orders for space in layer.beside)

    def input_variances(self, seed: int) -> dict[str, np.ndarray]:
        """Per layer that reads what the network is given, the variance of each input over the first samples."""
        layers = [layer for layer in self._real_layers() if layer.reads_input]
        return self.observer(None, seed).input_variances(layers, _SAMPLES) if layers else {}

    def equalise(self, variances: Mapping[str, np.ndarray]) -> None:
        """Give units equal sizes in the working copy; a copy of it becomes the network to agree with.

        Args:
            variances: per layer that reads what the network is given, of each input.
        """
        self.known = equalise(self.network, self.structure, variances)
        if self.known.scales:
            self.original = copy_of(self.network)

    def observer(self, max_rows: MaxRows, seed: int) -> Observer:
        """What reads layers of this task."""
        return Observer(
            self.task, self.network, self.original, self.samples, max_rows, seed, self.answers, self.forwards
        )

    def compared(self, layer: Layer, max_rows: MaxRows, seed: int) -> tuple[Observer, Tensor | None]:
        """What reads a layer against the original network, and which of the original's rows each present one is.

        Where units that lie along other axes of what the layer reads have moved, (sample, unit) stands in another place
        than in the original network, and so in the answers that are remembered. The original then runs again, with its
        own units moved likewise.
        """
        observer = self.observer(max_rows, seed)
        if not self._moves_beside(layer):
            return observer, self.original_rows(layer)
        original = copy_of(self.original)
        for space, order in self._orders.items():
            self.structure.reorder(original, space, order)
        return replace(observer, original=original, answers=Answers()), None

    def weights(self, layer: Layer) -> Tensor:
        """All incoming weights of a layer as they are now, [units, inputs * taps + 1], the bias last.

        They are float64, or complex128 where they are complex.
        """
        weight = self.network.get_parameter(layer.weight).detach().flatten(1)
        dtype = torch.promote_types(weight.dtype, torch.float64)
        whole = weight.new_zeros(len(weight), weight.shape[1] + 1, dtype=dtype)
        whole[:, :-1] = weight
        if layer.bias is not None:
            whole[:, -1] = self.network.get_parameter(layer.bias).detach()
        return whole

    def set_weights(self, layer: Layer, weights: Tensor) -> None:
        """Write incoming weights back into the working copy."""
        with torch.no_grad():
            parameter = self.network.get_parameter(layer.weight)
            parameter.copy_(weights[:, :-1].reshape(parameter.shape))
            if layer.bias is not None:
                self.network.get_parameter(layer.bias).copy_(weights[:, -1])

    def parameters(self, layer: Layer) -> list[nn.Parameter]:
        """The parameters of a layer as it is now: dense ones, or blocks."""
        blocks, names = installed(self.network), [name for name in (layer.weight, layer.bias) if name is not None]
        each = [blocks[name].parameters() if name in blocks else [self.network.get_parameter(name)] for name in names]
        return [parameter for parameters in each for parameter in parameters]

    def _weights(self, name: str) -> list[nn.Parameter]:
        blocks = installed(self.network)
        return weights_of(blocks[name]) if name in blocks else [self.network.get_parameter(name)]

    def pruned_weights(self) -> list[list[nn.Parameter]]:
        """The weight of every pruned layer as it is now: a dense parameter, or blocks."""
        return [self._weights(layer.weight) for layer in self.structure.layers if layer.name in self.pruned]

    def dense(self, name: str) -> Tensor:
        """A parameter as it is now, put together where it is blocks."""
        blocks = installed(self.network)
        return (blocks[name]() if name in blocks else self.network.get_parameter(name)).detach()

    def connections(self) -> int:
        """How many weights its layers have, without those that are missing."""
        pruned = {p for weight in self.pruned_weights() for p in weight}
        weights = {p for layer in self.structure.layers for p in self._weights(layer.weight)}
        return sum(int(p.count_nonzero()) if p in pruned else p.numel() for p in weights)

    def batch_norm(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Running mean and variance of the batch-norm behind a layer."""
        assert layer.batch_norm is not None
        return self.network.get_buffer(layer.batch_norm.mean), self.network.get_buffer(layer.batch_norm.variance)

    def batch_norm_scale(self, layer: Layer) -> Tensor:
        """What the batch-norm behind a layer divides its units by, float64."""
        assert layer.batch_norm is not None
        return (self.batch_norm(layer)[1].double() + layer.batch_norm.eps).sqrt()

    def place(self, space: int, joint: int, order: np.ndarray, slots: np.ndarray) -> None:
        """Put the units of a space into a new order, one that is allowed (`Space.allowed`).

        The unit in place k then stands in slot `slots[k]`.
        """
        self.structure.reorder(self.network, space, order)
        self._orders[space] = self._orders.get(space, np.arange(len(order)))[order]
        self.slots[space] = (joint, slots)
        self.known.reorder(space, order)

    def may_scale(self, layer: Layer) -> bool:
        """Whether the units of a layer can have a scale of their own, behind what torch's own module gives.

        There is one already where batch-norm follows; and what reads weights otherwise would multiply shared ones by
        the scales in every call, and in every graph.
        """
        if not layer.solvable or layer.batch_norm or self._calls[layer.weight.rpartition(".")[0]] != layer.calls:
            return False
        return has_own_scale(self.network, layer.weight, layer.bias)

    def sizes(self, layer: Layer) -> np.ndarray:
        """How large each row of a layer is by its weights (`equalising`); 1 where nothing is known of it."""
        sizes, rows = self.known.rows.get(layer.name, np.ones(layer.units)), self.original_rows(layer)
        return sizes if rows is None else sizes[rows.numpy()]

    def original_rows(self, layer: Layer) -> Tensor | None:
        """Per row of a layer, which row it was in the original network; None where no row has moved."""
        rows = np.arange(layer.units)
        for space, order in self._orders.items():
            positions = self.structure.spaces[space].positions(layer.rows)
            if positions.size:
                rows[positions.ravel()] = positions[order].ravel()
        return None if (rows == np.arange(layer.units)).all() else torch.from_numpy(rows)


def _few(batch: Batch, samples: int) -> Batch:
    """The first samples of a batch."""
    return pytree.tree_map_only(Tensor, lambda t: t[:samples] if t.dim() else t, batch)
