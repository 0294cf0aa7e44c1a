"""What a layer reads and what it should answer: one pass over a task's data, stopped at that layer.

The pass runs the user's own modules. A layer is recognised by its weight, at the moment it is handed to `linear` or to
a convolution, so that padding, stride and functional calls need no rules of their own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taskzip.answers import Answers
from taskzip.curvature import LayerStatistics
from taskzip.errors import GraphError, InputError
from taskzip.graph import Layer
from taskzip.task import Batch, Task, device_of, input_tensors, samples_in

MaxRows = int | Literal["auto"] | None

AUTO_ROWS_PER_INPUT = 50
"""With max_rows="auto": rows sampled per column of the curvature (design 2.6 says 20 to 50)."""

_linear = F.linear
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_HELD_OUT = 8
"""The rows of every so many samples can be held out."""

_CHUNK_ELEMENTS = 2**25  # values of one batch's patches that are held at once


class _Reached(BaseException):
    """The layer was called for the last time; nothing behind it is needed. No forward may catch it as an Exception."""


class _Read(NamedTuple):
    """One call of a layer: its input, its output if that was computed, and for a convolution how it slides."""

    x: Tensor
    z: Tensor | None
    slide: dict[str, Any] | None


class _Recorder(TorchFunctionMode):
    """Hands on the calls that are given certain weights, and stops the forward pass after the last of them.

    Functions that torch writes in Python on top of others, `multi_head_attention_forward` for one, run with the mode
    off; inside them `linear` is caught by its name.
    """

    def __init__(
        self, weights: Mapping[int, Layer], take: Callable[[Layer, _Read], None], *, outputs: bool = True
    ) -> None:
        """Layers by the id of their weight, and what to do with each read; what comes after may write into it.

        Without `outputs` the last of all calls is not computed.
        """
        super().__init__()
        self._outputs = outputs
        self._weights = weights
        self._take = take
        self.left = {layer.name: layer.calls for layer in weights.values()}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _linear:
            return self._keep(func, {}, *args, **kwargs)
        if func in _CONVOLUTIONS:
            return self._keep(func, {"stride": 1, "padding": 0, "dilation": 1}, *args, **kwargs)
        if isinstance(func, FunctionType):
            with _replaced(F, "linear", partial(self._keep, _linear, {})):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _keep(self, func: Callable[..., Tensor], slide: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        given = slide | dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        layer = self._weights.get(id(given["weight"]))
        wanted = layer is None or self._outputs or sum(self.left.values()) > 1
        result = func(*args, **kwargs) if wanted else None
        if layer is not None:
            self._take(layer, _Read(given["input"], result, {name: given[name] for name in slide} or None))
            self.left[layer.name] -= 1
            if not any(self.left.values()):
                raise _Reached
        assert result is not None
        return result


@contextmanager
def _replaced(module: ModuleType, name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)


@contextmanager
def keeping_modes(*models: nn.Module) -> Iterator[None]:
    """Leave every module's mode as it was."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def counted_calls(network: nn.Module) -> Iterator[Counter[str]]:
    """How often each module of a network is called meanwhile, by its path."""
    calls: Counter[str] = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: calls.update([path]))
        for path, module in network.named_modules()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run models in eval mode without gradients, and leave every module's mode and buffers as they were."""
    with in_eval_mode(*models), torch.no_grad():
        yield


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode, and leave every module's mode and buffers as they were."""
    modules = {module for model in models for module in model.modules()}
    buffers = [(module, dict(module._buffers)) for module in modules if module._buffers]
    values = {b: b.detach().clone() for _, each in buffers for b in each.values() if b is not None}
    try:
        with keeping_modes(*models):
            for model in models:
                model.eval()
            yield
    finally:
        for module, each in buffers:
            module._buffers.update(each)
        with torch.no_grad():
            for buffer, value in values.items():
                buffer.copy_(value)


def run_batch(task: Task, model: nn.Module, batch: Batch, index: int) -> Any:
    """Run one batch of the task's data.

    Raises:
        InputError: the network does not take the batch, naming its shapes.
    """
    try:
        return task.run(model, batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in input_tensors(batch))
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"task {task.name!r}: the network fails on batch {index} with inputs {shapes}: {reason}"
        ) from error


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

    def observe(
        self, layer: Layer, *, changed: bool, rows: Tensor | None = None, hold_out: bool = False
    ) -> LayerStatistics:
        """Sum up what `layer` reads, and what the original network answers there.

        Args:
            layer: a layer of the network, still with a dense weight.
            changed: whether its inputs may differ from the original network's; if not, one forward pass serves both.
            rows: which of the original's units each present one is, where they are in another order.
            hold_out: whether the rows of every eighth sample are also summed up by themselves.

        Raises:
            InputError: inputs that are not finite, or a network that fails on its data.
        """
        generator = torch.Generator().manual_seed(self.seed)
        statistics = LayerStatistics(layer.inputs * layer.taps, layer.units, device_of(self.network))
        held: LayerStatistics | None = None
        hold_out, seen = hold_out and self.samples >= 2 * _HELD_OUT, 0
        with evaluating(self.network, self.original):
            for index, batch in enumerate(self.task.batches()):
                recalled = self.answers.recall(layer.name, batch, index) if changed else None
                reads = self._reads(self.network, layer, batch, index, outputs=not changed)
                others = self._reads(self.original, layer, batch, index) if changed and recalled is None else reads
                chunks = iter(recalled or ())
                for read, other in zip(reads, others, strict=True):
                    inputs = _inputs(read, layer)
                    places = inputs.shape[: inputs.dim() - 1 - len(layer.kernel)]
                    outputs = None if recalled else _outputs(other, layer)
                    for where, weight in self._choose(places, layer, samples_in(batch), generator):
                        z = next(chunks) if outputs is None else outputs[where]
                        z = z[:, rows.to(z.device)] if changed and rows is not None else z
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
        before, now = (LayerStatistics(0, layer.units, device_of(self.network)) for _ in range(2))
        with evaluating(self.network, self.original):
            for index, batch in enumerate(self.task.batches()):
                for read in self._reads(self.network, layer, batch, index):
                    z = _outputs(read, layer).flatten(0, -2)
                    now.update(z[:, :0], z)
                for read in self._reads(self.original, layer, batch, index):
                    z = _outputs(read, layer).flatten(0, -2)
                    before.update(z[:, :0], z if rows is None else z[:, rows.to(z.device)])
        self._check(now, layer)
        return before, now

    def input_variances(self, layers: Sequence[Layer], samples: int) -> dict[str, np.ndarray]:
        """Of each input of these layers, over the first so many samples; grouped convolutions are left out."""
        found: dict[str, LayerStatistics] = {}

        def take(layer: Layer, read: _Read) -> None:
            x = _by_channel(read.x, layer).flatten(0, -2)
            if x.shape[1] == layer.inputs:
                found.setdefault(layer.name, LayerStatistics(0, layer.inputs, x.device)).update(x[:, :0], x)

        with evaluating(self.original):
            for index, batch in enumerate(self.task.batches()):
                self._run(self.original, layers, take, batch, index, outputs=False)
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
            layers: of the network.
            wanted: names of those whose inputs are to be summed up, too, without their answers.
        """
        generators = {layer.name: torch.Generator().manual_seed(self.seed) for layer in layers}
        device = device_of(self.original)
        found = {x.name: LayerStatistics(x.inputs * x.taps, 0, device) for x in layers if x.name in wanted}
        samples = 0

        def take(layer: Layer, read: _Read) -> None:
            outputs = _outputs(read, layer)
            inputs = _inputs(read, layer) if layer.name in found else None
            for where, weight in self._choose(outputs.shape[:-1], layer, samples, generators[layer.name]):
                self.answers.keep(layer.name, outputs[where])
                if inputs is not None:
                    rows = inputs[where].flatten(1)
                    found[layer.name].update(rows, rows[:, :0], weight)

        with evaluating(self.original):
            for index, batch in enumerate(self.task.batches()):
                samples = samples_in(batch)
                self.answers.start(batch)
                self._run(self.original, layers, take, batch, index)
        for layer in layers:
            if layer.name in found:
                self._check(found[layer.name], layer)
        return found

    def _check(self, statistics: LayerStatistics, layer: Layer) -> None:
        if not statistics.is_finite():
            raise InputError(
                f"task {self.task.name!r}, layer {layer.name!r}: its inputs or outputs are NaN or infinite on the data."
            )

    def _reads(
        self, model: nn.Module, layer: Layer, batch: Batch, index: int, *, outputs: bool = True
    ) -> Sequence[_Read]:
        reads: list[_Read] = []

        def keep(layer: Layer, read: _Read) -> None:
            if len(reads) + 1 < layer.calls:
                read = read._replace(x=read.x.clone(), z=read.z.clone() if outputs and read.z is not None else None)
            reads.append(read)

        self._run(model, [layer], keep, batch, index, outputs=outputs)
        return reads

    def _run(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        take: Callable[[Layer, _Read], None],
        batch: Batch,
        index: int,
        *,
        outputs: bool = True,
    ) -> None:
        """Run a batch as far as these layers."""
        weights = {id(model.get_parameter(layer.weight)): layer for layer in layers}
        recorder = _Recorder(weights, take, outputs=outputs)
        try:
            with recorder:
                run_batch(self.task, model, batch, index)
        except _Reached:
            return
        layer, left = next((layer, recorder.left[layer.name]) for layer in layers if recorder.left[layer.name])
        raise GraphError(
            f"task {self.task.name!r}, layer {layer.name!r}: called {layer.calls - left} times on batch {index}, but "
            f"{layer.calls} times in the exported graph: the forward must be the same on every batch."
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


def _samples_of(where: tuple[Tensor, ...], places: Sequence[int], samples: int) -> Tensor:
    """The sample, in its batch, of each of some rows; a linear layer's lie sample by sample along one axis."""
    return where[0] if len(places) > 1 else where[0] * samples // places[0]


class Glimpse(NamedTuple):
    """What a layer answers in one call, in little.

    Attributes:
        rows: [places, units], at some places.
        means: [2, units], mean and root mean square over all places.
    """

    rows: Tensor
    means: Tensor


def glimpses(
    task: Task, model: nn.Module, layers: Sequence[Layer], batch: Batch, places: int
) -> dict[str, list[Glimpse]]:
    """What layers answer to one batch, call by call, at the same places for any model of the same layers."""
    found: dict[str, list[Glimpse]] = {}

    def take(layer: Layer, read: _Read) -> None:
        z = _outputs(read, layer)
        shape = z.shape[:-1]
        generator = torch.Generator().manual_seed(len(found.setdefault(layer.name, [])))
        chosen = torch.randint(max(math.prod(shape), 1), (min(places, math.prod(shape)),), generator=generator)
        over = tuple(range(z.dim() - 1))
        means = torch.stack([z.mean(over), torch.linalg.vector_norm(z, dim=over) / math.prod(shape) ** 0.5])
        found[layer.name].append(Glimpse(z[torch.unravel_index(chosen.to(z.device), shape)], means))

    with suppress(_Reached), _Recorder({id(model.get_parameter(x.weight)): x for x in layers}, take):
        run_batch(task, model, batch, 0)
    return found


def _inputs(read: _Read, layer: Layer) -> Tensor:
    """What a layer reads: [*places, inputs] or [*places, inputs, *kernel], without a copy."""
    x = _at_least_float32(read.x)
    return x.reshape(-1, x.shape[-1]) if read.slide is None else _windows(x, layer.kernel, **read.slide)


def _outputs(read: _Read, layer: Layer) -> Tensor:
    """What a layer answers: [*places, units]."""
    assert read.z is not None
    return _by_channel(read.z, layer)


def _by_channel(z: Tensor, layer: Layer) -> Tensor:
    """What a layer reads or answers, its channels last: [*places, channels]."""
    z = _at_least_float32(z)
    if not layer.kernel:
        return z.reshape(-1, z.shape[-1])
    channel = z.dim() - 1 - len(layer.kernel)
    return z.movedim(channel, -1) if channel else z.movedim(0, -1)[None]


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
