"""A task while it is being zipped: a working copy of its network, what is known of it, and what it shares so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from taskzip.answers import Answers
from taskzip.copying import copy_of, uncompiled
from taskzip.errors import GraphError, InputError
from taskzip.graph import Layer, Structure, analyse
from taskzip.observation import MaxRows, Observer, evaluating, run_batch
from taskzip.outputs import tensors
from taskzip.task import Batch, Task, has_numbers
from taskzip.zipped.blocks import installed
from taskzip.zipped.folding import fold, foldable

Owners = tuple[int, ...]
"""The tasks that own a unit, by their numbers, ascending."""

Slots = dict[int, tuple[int, np.ndarray]]
"""Per space of a task, its joint space and the slot of each unit: units of two tasks in one slot belong together."""

_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}


class Member:
    """The state of one task between two layers: plain tensors and numbers only, so that it can be saved and resumed.

    Attributes:
        task: what the caller gave; its model is read, never written.
        network: the working copy, zipped in place, in eval mode.
        structure: layers and spaces of the network.
        original: the network that `network` should agree with: the caller's, or a copy with batch-norm folded.
        folded: the batch-norms that were folded into the layers before them.
        samples: how many samples the calibration data hold.
        slots: per space that has been put into order, the joint space, and in which of its slots each unit stands.
        changed: whether anything upstream may differ from the original network.
        answers: what the original network answers, as far as it is remembered.
    """

    def __init__(self, task: Task, seed: int, *, fold_batch_norm: bool = False) -> None:
        self.task = task
        self._check_parameters()
        self.samples = task.check_data()
        self.original = uncompiled(task.model)
        self.network = copy_of(self.original).eval()
        batch = next(task.batches())
        answers = self._first_answers(batch)
        self.structure = self._analyse(batch)
        self.folded = foldable(self.network, self.structure.layers) if fold_batch_norm else []
        if self.folded:
            self.original = self._fold(batch, answers)
        self._check_orders(batch, answers, seed)
        self.slots: Slots = {}
        self._orders: dict[int, np.ndarray] = {}  # per space, which of the original's units stands in each place
        self.changed = False
        self.answers = Answers()

    def _first_answers(self, batch: Batch) -> Any:
        with evaluating(self.network):
            answers = run_batch(self.task, self.network, batch, 0)
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

    def _fold(self, batch: Batch, answers: Any) -> nn.Module:
        """Fold batch-norms in the working copy, and read it again; a copy of it becomes the network to agree with."""
        fold(self.network, self.folded)
        try:
            self.structure = self._analyse(batch)
        except GraphError as error:
            raise GraphError(f"{error} That is with its batch-norms folded: zip with batch_norm='private'.") from error
        if not self._agrees((), (), batch, answers):
            self._check_steady(batch, answers)
            raise GraphError(
                f"task {self.task.name!r}: with its batch-norms folded the network gives other outputs, so they do "
                f"more than torch's own; zip with batch_norm='private'."
            )
        return copy_of(self.network)

    def _check_orders(self, batch: Batch, answers: Any, seed: int) -> None:
        """Re-order every space at random in a copy of the network: it must still give its own outputs.

        Raises:
            GraphError: it does not, naming the layer whose units were misread.
            InputError: the network gives other outputs each time it runs, whatever the order.
        """
        rng = np.random.default_rng(seed)
        orders = [rng.permutation(len(space.units)) for space in self.structure.spaces]
        if self._agrees(orders, range(len(orders)), batch, answers):
            return
        self._check_steady(batch, answers)
        for space in range(len(orders)):
            if not self._agrees(orders, [space], batch, answers):
                layer = next((x.name for x in self.structure.layers if space in x.spaces), "an unnamed layer")
                raise GraphError(
                    f"task {self.task.name!r}: re-ordering the units of {layer!r} changes the outputs, so its readers "
                    f"were misunderstood. Please report the architecture; the network cannot be zipped as it is."
                )
        raise GraphError(
            f"task {self.task.name!r}: re-ordering hidden units changes the outputs; please report the network."
        )

    def _check_steady(self, batch: Batch, answers: Any) -> None:
        """Whether the caller's network gives the same outputs when it runs once more."""
        with evaluating(self.original):
            again = run_batch(self.task, self.original, batch, 0)
        if not _same(answers, again):
            raise InputError(
                f"task {self.task.name!r}: the network gives other outputs when it runs twice on one batch in eval "
                f"mode: it draws random numbers (dropout that is always on, sampling) or keeps a state. Make it "
                f"deterministic in eval mode, for zipping compares what it answers."
            )

    def _agrees(self, orders: Sequence[np.ndarray], spaces: Sequence[int], batch: Batch, answers: Any) -> bool:
        network = copy_of(self.network)
        for space in spaces:
            self.structure.reorder(network, space, orders[space])
        with evaluating(network):
            given = run_batch(self.task, network, batch, 0)
        return _same(answers, given)

    def observer(self, max_rows: MaxRows, seed: int) -> Observer:
        """What reads layers of this task."""
        return Observer(self.task, self.network, self.original, self.samples, max_rows, seed, self.answers)

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
        return [p for name in (layer.weight, layer.bias) if name is not None for p in self._parameters(name)]

    def _parameters(self, name: str) -> list[nn.Parameter]:
        blocks = installed(self.network)
        return list(blocks[name].parameters()) if name in blocks else [self.network.get_parameter(name)]

    def layer_weights(self) -> list[list[nn.Parameter]]:
        """The weight of every layer as it is now: a dense parameter, or blocks."""
        return [self._parameters(layer.weight) for layer in self.structure.layers]

    def connections(self) -> int:
        """How many weights of its layers are not 0."""
        return sum(int(p.count_nonzero()) for weight in self.layer_weights() for p in weight)

    def batch_norm(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Running mean and variance of the batch-norm behind a layer."""
        assert layer.batch_norm is not None
        return self.network.get_buffer(layer.batch_norm.mean), self.network.get_buffer(layer.batch_norm.variance)

    def batch_norm_scale(self, layer: Layer) -> Tensor:
        """What the batch-norm behind a layer divides its units by, float64."""
        assert layer.batch_norm is not None
        return (self.batch_norm(layer)[1].double() + layer.batch_norm.eps).sqrt()

    def place(self, space: int, joint: int, order: np.ndarray, slots: np.ndarray) -> None:
        """Put the units of a space into a new order; the unit in place k then stands in slot `slots[k]`."""
        self.structure.reorder(self.network, space, order)
        self._orders[space] = self._orders.get(space, np.arange(len(order)))[order]
        self.slots[space] = (joint, slots)

    def original_rows(self, layer: Layer) -> Tensor | None:
        """Per row of a layer, which row it was in the original network; None where no row has moved."""
        rows = np.arange(layer.units)
        for space, order in self._orders.items():
            positions = self.structure.spaces[space].positions(layer.rows)
            if positions.size:
                rows[positions.ravel()] = positions[order].ravel()
        return None if (rows == np.arange(layer.units)).all() else torch.from_numpy(rows)


def _same(wanted: Any, given: Any) -> bool:
    return all(_close(a, b) for a, b in zip(tensors(wanted), tensors(given), strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    if not has_numbers(a):
        return bool((a == b).all())
    apart = a != b  # equal infinities are equal
    if not apart.any():
        return True
    largest = a[a.isfinite()].abs().max() if a.isfinite().any() else a.new_zeros(()).abs()
    return bool((a - b)[apart].abs().max() <= _ROUNDING.get(a.abs().dtype, 5e-2) * largest)
