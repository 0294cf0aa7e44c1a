"""What a layer reads and what it should answer: one pass over a task's data, stopped at that layer.

The pass runs the user's own modules. A layer is recognised by its weight, at the moment it is handed to `linear` or to
a convolution, so that padding, stride and functional calls need no rules of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taskzip.curvature import LayerStatistics
from taskzip.errors import InputError
from taskzip.graph import Layer
from taskzip.task import Batch, Task, input_tensors, samples_in

MaxRows = int | Literal["auto"] | None

AUTO_ROWS_PER_INPUT = 50
"""With max_rows="auto": rows sampled per column of the curvature (design 2.6 says 20 to 50)."""

_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_CHUNK_ELEMENTS = 2**25  # values of one batch's patches that are held at once


class _Reached(BaseException):
    """The layer was called for the last time; nothing behind it is needed. No forward may catch it as an Exception."""


class _Read(NamedTuple):
    """One call of a layer: its input, its output, and for a convolution how it slides."""

    x: Tensor
    z: Tensor
    slide: dict[str, Any] | None


class _Recorder(TorchFunctionMode):
    """Keeps the calls that are given a certain weight, and stops the forward pass after the last of them."""

    def __init__(self, weight: Tensor, calls: int) -> None:
        super().__init__()
        self.weight = weight
        self.calls = calls
        self.reads: list[_Read] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.linear or func in _CONVOLUTIONS:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            given = dict(zip(names, args, strict=False)) | kwargs
            if given["weight"] is self.weight:
                slide = None
                if func is not F.linear:
                    slide = {
                        name: given.get(name, default)
                        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
                    }
                self.reads.append(_Read(given["input"], result, slide))
                if len(self.reads) == self.calls:
                    raise _Reached
        return result


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run models in eval mode without gradients, and leave every module's mode as it was."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def run_batch(task: Task, model: nn.Module, batch: Batch, index: int) -> Any:
    """Run one batch of the task's data.

    Raises:
        InputError: the network does not take the batch, naming its shapes.
    """
    try:
        return task.run(model, batch)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in input_tensors(batch))
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"task {task.name!r}: the network fails on batch {index} with inputs {shapes}: {reason}"
        ) from error


@dataclass(frozen=True)
class Observer:
    """Reads layers of one task: `network` as zipped so far, against the answers of the task's original network."""

    task: Task
    network: nn.Module
    samples: int
    max_rows: MaxRows
    seed: int

    def observe(self, layer: Layer, *, changed: bool) -> LayerStatistics:
        """Sum up what `layer` reads, and what the original network answers there.

        Args:
            layer: a layer of the network, still with a dense weight.
            changed: whether its inputs may differ from the original network's; if not, one forward pass serves both.

        Raises:
            InputError: inputs that are not finite, or a network that fails on its data.
        """
        weight = self.network.get_parameter(layer.weight)
        original = self.task.model.get_parameter(layer.weight)
        generator = torch.Generator().manual_seed(self.seed)
        statistics = LayerStatistics(layer.inputs * layer.taps, layer.units, weight.device)
        with evaluating(self.network, self.task.model):
            for index, batch in enumerate(self.task.batches()):
                reads = self._reads(self.network, weight, layer.calls, batch, index)
                answers = self._reads(self.task.model, original, layer.calls, batch, index) if changed else reads
                for read, answer in zip(reads, answers, strict=True):
                    self._add(statistics, read, answer.z, layer, samples_in(batch), generator)
        if not statistics.is_finite():
            raise InputError(
                f"task {self.task.name!r}, layer {layer.name!r}: its inputs or outputs are NaN or infinite on the data."
            )
        return statistics

    def _reads(self, model: nn.Module, weight: Tensor, calls: int, batch: Batch, index: int) -> Sequence[_Read]:
        recorder = _Recorder(weight, calls)
        try:
            with recorder:
                run_batch(self.task, model, batch, index)
        except _Reached:
            pass
        return recorder.reads

    def _add(
        self,
        statistics: LayerStatistics,
        read: _Read,
        z: Tensor,
        layer: Layer,
        samples: int,
        generator: torch.Generator,
    ) -> None:
        x, z = _at_least_float32(read.x), _at_least_float32(z)
        if read.slide is None:
            rows, answers = x.reshape(-1, x.shape[-1]), z.reshape(-1, z.shape[-1])
            for kept, weight in self._choose(len(rows), layer, samples, generator):
                statistics.update(rows[kept], answers[kept], weight)
        else:
            patches = _windows(x, layer.kernel, **read.slide)
            channel = z.dim() - len(layer.kernel) - 1
            at = z.movedim(channel, -1) if channel else z.movedim(0, -1)[None]
            places = at.shape[:-1]
            for kept, weight in self._choose(math.prod(places), layer, samples, generator):
                where = torch.unravel_index(kept.to(x.device), places)
                statistics.update(patches[where].flatten(1), at[where], weight)

    def _choose(
        self, rows: int, layer: Layer, samples: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, float]]:
        """Which rows of a batch to use, in chunks, and how many rows each of them stands for."""
        columns = layer.inputs * layer.taps
        limit = AUTO_ROWS_PER_INPUT * (columns + 1) if self.max_rows == "auto" else self.max_rows
        wanted = rows if limit is None else min(rows, math.ceil(limit * samples / self.samples / layer.calls))
        kept = torch.arange(rows) if wanted == rows else torch.randperm(rows, generator=generator)[:wanted]
        for chunk in kept.split(max(1, _CHUNK_ELEMENTS // columns)):
            yield chunk, rows / wanted


def _windows(x: Tensor, kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> Tensor:
    """A view of what a kernel sees at each place: [batch, *places, channels, *kernel] (a copy only for padding)."""
    n = len(kernel)
    stride, dilation = _each(stride, n), _each(dilation, n)
    if x.dim() == n + 1:  # a sample without a batch axis
        x = x[None]
    if padding == "valid":
        padding = 0
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    sides = [(r // 2, r - r // 2) for r in reach] if padding == "same" else [(p, p) for p in _each(padding, n)]
    if any(side != (0, 0) for side in sides):
        x = F.pad(x, [amount for side in reversed(sides) for amount in side])
    places = [(size - r - 1) // s + 1 for size, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    steps = x.stride()
    return x.as_strided(
        (x.shape[0], *places, x.shape[1], *kernel),
        (
            steps[0],
            *(t * s for t, s in zip(steps[2:], stride, strict=True)),
            steps[1],
            *(t * d for t, d in zip(steps[2:], dilation, strict=True)),
        ),
        x.storage_offset(),
    )


def _each(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value) * (n if len(value) == 1 else 1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
