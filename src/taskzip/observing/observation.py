"""What a layer reads and what it should answer, summed up over a task's data."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from taskzip.algebra import LayerStatistics
from taskzip.errors import InputError
from taskzip.graph import Layer
from taskzip.observing.answers import Answers
from taskzip.observing.layer_calls import Read, check_calls, run_to
from taskzip.observing.rows import by_channel, inputs_of, outputs_of
from taskzip.observing.suspension import Forwards
from taskzip.tasks import Batch, Task, device_of, evaluating, samples_in

MaxRows = int | Literal["auto"] | None

AUTO_ROWS_PER_INPUT = 50
"""With max_rows="auto": rows sampled per column of the curvature (design 2.6 says 20 to 50)."""

_HELD_OUT = 8
"""The rows of every so many samples can be held out."""

_CHUNK_ELEMENTS = 2**25  # values of one batch's patches that are held at once


@dataclass(frozen=True)
class Observer:
    """Reads layers of one task: `network` as zipped so far, against the answers of the `original` one."""

    task: Task
    network: nn.Module
    original: nn.Module
    samples: int
    max_rows: MaxRows
    seed: int
    answers: Answers
    forwards: Forwards

    def observe(
        self, layer: Layer, *, original: bool, rows: Tensor | None = None, hold_out: bool = False
    ) -> LayerStatistics:
        """Sum up what `layer` reads, and what the original network answers there.

        Args:
            layer: a layer of the network, still with a dense weight.
            original: whether the answers are those of the original network, whose inputs may be others, or its own.
            rows: which of the original's units each present one is, where they are in another order.
            hold_out: whether the rows of every eighth sample are also summed up by themselves.

        Raises:
            InputError: inputs that are not finite, or a network that fails on its data.
        """
        generator = torch.Generator().manual_seed(self.seed)
        statistics = LayerStatistics(layer.inputs * layer.taps, layer.units, device_of(self.network))
        held: LayerStatistics | None = None
        hold_out, seen = hold_out and self.samples >= 2 * _HELD_OUT, 0
        with evaluating(self.original):
            for index, (batch, reads) in enumerate(self.forwards.reads(layer, outputs=not original)):
                recalled = self.answers.recall(layer.name, batch, index) if original else None
                others = self._answers(layer, batch, index) if original and recalled is None else reads
                chunks = iter(recalled or ())
                for read, other in zip(reads, others, strict=True):
                    inputs = inputs_of(read, layer)
                    places = inputs.shape[: inputs.dim() - 1 - len(layer.kernel)]
                    answers = None if recalled else outputs_of(other, layer)
                    for where, weight in self._choose(places, layer, samples_in(batch), generator):
                        z = next(chunks) if answers is None else answers[where]
                        z = z[:, rows.to(z.device)] if original and rows is not None else z
                        x = inputs[where].flatten(1)
                        if hold_out:
                            held = statistics.held_out_beside(z) if held is None else held
                            out = (seen + _samples_of(where, places, samples_in(batch))) % _HELD_OUT == 0
                            held.update(x[out], z[out], weight)
                            x, z = x[~out], z[~out]
                        statistics.update(x, z, weight)
                seen += samples_in(batch)
        statistics = statistics if held is None else statistics.with_held_out(held)
        self._check(statistics, layer)
        return statistics

    def observe_outputs(self, layer: Layer, rows: Tensor | None = None) -> tuple[LayerStatistics, LayerStatistics]:
        """Sum up only what a layer answers, in the original network and now; no inputs.

        Args:
            layer: of the network.
            rows: which of the original's units each present one is, where they are in another order.
        """
        known = self.answers.moments.get(layer.name)
        before, now = (LayerStatistics(0, layer.units, device_of(self.network)) for _ in range(2))
        with evaluating(self.original):
            for index, (batch, reads) in enumerate(self.forwards.reads(layer, outputs=True)):
                _add_outputs(now, reads, layer)
                if known is None:
                    _add_outputs(before, self._answers(layer, batch, index), layer)
        self._check(now, layer)
        before = known or before
        return before if rows is None else before.of_units(rows.to(device_of(self.network))), now

    def _answers(self, layer: Layer, batch: Batch, index: int) -> Sequence[Read]:
        """What the original network answers, call by call, where it was not remembered."""
        reads: list[Read] = []
        take = lambda layer, read: reads.append(read if len(reads) + 1 == layer.calls else read.copied())  # noqa: E731
        left = run_to(self.task, self.original, [layer], take, batch, index)
        check_calls(self.task, layer, left[layer.name], index)
        return reads

    def input_variances(self, layers: Sequence[Layer], samples: int) -> dict[str, np.ndarray]:
        """Of each input of these layers, over the first so many samples; grouped convolutions are left out."""
        found: dict[str, LayerStatistics] = {}

        def take(layer: Layer, read: Read) -> None:
            x = by_channel(read.x, layer).flatten(0, -2)
            if x.shape[1] == layer.inputs:
                found.setdefault(layer.name, LayerStatistics(0, layer.inputs, x.device)).update(x[:, :0], x)

        with evaluating(self.original):
            for index, batch in enumerate(self.task.batches()):
                run_to(self.task, self.original, layers, take, batch, index, outputs=False)
                samples -= samples_in(batch)
                if samples <= 0:
                    break
        for layer in layers:
            if layer.name in found:
                self._check(found[layer.name], layer)
        return {name: statistics.answer_moments()[1].cpu().numpy() for name, statistics in found.items()}

    def survey(self, layers: Sequence[Layer], wanted: Collection[str]) -> dict[str, LayerStatistics]:
        """Remember what the original network answers in these layers, in one pass over the data.

        Args:
            layers: of the network; of those that least squares cannot solve, mean and variance of the answers.
            wanted: names of those whose inputs are to be summed up, too, without their answers.
        """
        generators = {layer.name: torch.Generator().manual_seed(self.seed) for layer in layers}
        device = device_of(self.original)
        found = {x.name: LayerStatistics(x.inputs * x.taps, 0, device) for x in layers if x.name in wanted}
        by_name, samples = {layer.name: layer for layer in layers}, 0

        def take(layer: Layer, read: Read) -> None:
            outputs = outputs_of(read, layer)
            if not layer.solvable and layer.name not in found:
                moments = self.answers.moments.setdefault(layer.name, LayerStatistics(0, layer.units, device))
                _add_outputs(moments, [read], layer)
                return
            inputs = inputs_of(read, layer) if layer.name in found else None
            for where, weight in self._choose(outputs.shape[:-1], layer, samples, generators[layer.name]):
                self.answers.keep(layer.name, outputs[where])
                if inputs is not None:
                    rows = inputs[where].flatten(1)
                    found[layer.name].update(rows, rows[:, :0], weight)

        with evaluating(self.original):
            for index, batch in enumerate(self.task.batches()):
                samples = samples_in(batch)
                self.answers.start(batch)
                for name, left in run_to(self.task, self.original, layers, take, batch, index).items():
                    check_calls(self.task, by_name[name], left, index)
        for layer in layers:
            if layer.name in found:
                self._check(found[layer.name], layer)
        return found

    def _check(self, statistics: LayerStatistics, layer: Layer) -> None:
        if not statistics.is_finite():
            raise InputError(
                f"task {self.task.name!r}, layer {layer.name!r}: its inputs or outputs are NaN or infinite on the data."
            )

    def _choose(
        self, places: tuple[int, ...], layer: Layer, samples: int, generator: torch.Generator
    ) -> Iterator[tuple[tuple[Tensor, ...], float]]:
        """Which rows of a call to use, in chunks, as an index into its places; how many rows each stands for."""
        rows, columns = math.prod(places), layer.inputs * layer.taps
        limit = AUTO_ROWS_PER_INPUT * (columns + 1) if self.max_rows == "auto" else self.max_rows
        wanted = rows if limit is None else min(rows, math.ceil(limit * samples / self.samples / layer.calls))
        kept = torch.arange(rows) if wanted == rows else torch.randperm(rows, generator=generator)[:wanted]
        for chunk in kept.split(max(1, _CHUNK_ELEMENTS // columns)):
            yield torch.unravel_index(chunk.to(device_of(self.network)), places), rows / wanted


def _add_outputs(statistics: LayerStatistics, reads: Sequence[Read], layer: Layer) -> None:
    for read in reads:
        z = outputs_of(read, layer).flatten(0, -2)
        statistics.update(z[:, :0], z)


def _samples_of(where: tuple[Tensor, ...], places: Sequence[int], samples: int) -> Tensor:
    """The sample, in its batch, of each of some rows; a linear layer's lie sample by sample along one axis."""
    return where[0] if len(places) > 1 else where[0] * samples // places[0]
