"""Forward passes that wait at the layers they reach, and go on with new weights once these are zipped (design 2.7).

Every batch of a task has a forward of its own, in a greenlet: the user's own modules, with any control flow. While it
waits, what is alive in it is kept. It begins again where it cannot go on: where a layer is wanted that it has passed,
and where weights have changed that it has used. So what is read at a layer is what a new forward would read there.
"""

from __future__ import annotations

import contextvars
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from greenlet import GreenletExit, greenlet
from torch import Tensor, nn

from taskzip.graph import Layer
from taskzip.observing.layer_calls import Call, LayerCalls, Reached, Read, check_calls, uncaught
from taskzip.tasks import Batch, Task, evaluating, run_batch, version

_AUTOCAST = [device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)]

MEMORY = 2**30
"""Bytes of activations that the waiting forwards of one network hold."""


class Forwards:
    """The forwards of a network on all of a task's batches."""

    def __init__(self, task: Task, network: nn.Module, dense: Callable[[str], Tensor], memory: int = MEMORY) -> None:
        """How the network is run, what puts one of its weights together, and how many bytes may be held."""
        self._task = task
        self._network = network
        self._dense = dense
        self._memory = memory
        self._waiting: dict[int, Forward] = {}

    def reads(self, layer: Layer, *, outputs: bool) -> Iterator[tuple[Batch, Sequence[Read]]]:
        """What a layer reads, batch by batch, call by call, in eval mode and without gradients.

        Args:
            layer: of the network, still with a dense weight.
            outputs: whether its answers are computed, too, with the weights that it has now.

        Raises:
            InputError: the network fails on its data.
            GraphError: the layer is not called as often as in the exported graph.
        """
        now = Now(self._network, self._dense)
        torch.clear_autocast_cache()  # the weights that an autocast around all this has cast are not those of now
        with evaluating(self._network):
            for index, batch in enumerate(self._task.batches()):
                forward = self._waiting.pop(index, None)
                if forward is not None and not forward.can_reach(layer, now):
                    forward.close()
                    forward = None
                forward = forward or Forward(self._task, self._network, batch, index)
                try:
                    yield forward.batch, forward.read(layer, now, outputs=outputs)
                    held = sum(each.nbytes for each in self._waiting.values()) + forward.nbytes
                    if forward.waits and held <= self._memory:
                        self._waiting[index] = forward
                finally:
                    if index not in self._waiting:
                        forward.close()

    def close(self) -> None:
        """End all forwards, where they are."""
        while self._waiting:
            self._waiting.popitem()[1].close()


class Now:
    """The parameters and buffers of a network as they are at one moment."""

    def __init__(self, network: nn.Module, dense: Callable[[str], Tensor]) -> None:
        self.named = dict(network.named_parameters(remove_duplicate=False)) | dict(
            network.named_buffers(remove_duplicate=False)
        )
        self.tensors = {id(tensor): tensor for tensor in self.named.values()}
        self._dense = dense
        self._whole: dict[str, Tensor] = {}

    def dense(self, name: str) -> Tensor:
        """A weight or bias, put together where it is blocks."""
        if name not in self._whole:
            self._whole[name] = self._dense(name)
        return self._whole[name]

    def parts(self, name: str) -> list[Tensor]:
        """A weight or bias itself, or its blocks."""
        return [tensor for n, tensor in self.named.items() if n == name or n.startswith(f"{name}_blocks.")]


class _Used:
    """What of a network a forward has read so far."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Tensor, object]] = {}  # an alias keeps the memory, so that nothing else lies there

    def add(self, tensors: Iterable[Any], now: Now) -> None:
        for tensor in tensors:
            if id(tensor) in now.tensors:
                self._seen[id(tensor)] = (tensor.detach(), version(tensor))

    def unchanged(self, now: Now) -> bool:
        """Whether all of it is in the network still, with the same values."""
        return all(
            (tensor := now.tensors.get(key)) is not None
            and tensor.data_ptr() == alias.data_ptr()
            and version(tensor) == before
            for key, (alias, before) in self._seen.items()
        )


class Forward:
    """One forward of a network on one batch.

    Attributes:
        batch: what the network reads.
        nbytes: how much memory is held for it where it waits.
    """

    def __init__(self, task: Task, network: nn.Module, batch: Batch, index: int) -> None:
        self.batch = batch
        self.nbytes = 0
        self._task, self._network, self._index = task, network, index
        self._passed: set[int] = set()  # weights that linear layers and convolutions were called with
        self._used = _Used()
        self._results: list[weakref.ref[Tensor]] = []
        self._kept = _Attributes(())
        self._target: int | None = None
        self._body = greenlet(self._run)
        self._body.gr_context = contextvars.copy_context()

    @property
    def waits(self) -> bool:
        """Whether it is neither at its beginning nor at its end."""
        return bool(self._body)  # a greenlet that runs or waits is true

    def can_reach(self, layer: Layer, now: Now) -> bool:
        """Whether it would read at this layer what a new forward of the network would read."""
        return (
            not self._body.dead
            and id(now.named[layer.weight]) not in self._passed
            and self._used.unchanged(now)
            and self._kept.unchanged()
        )

    def read(self, layer: Layer, now: Now, *, outputs: bool) -> Sequence[Read]:
        """Go on to the last call of a layer and wait there: what it reads in all of its calls."""
        reads: list[Read] = []
        self._layer, self._reads, self._with_outputs = layer, reads, outputs
        self._go_on(id(now.named[layer.weight]), now)
        check_calls(self._task, layer, layer.calls - len(reads), self._index)
        self._reads = []
        self.nbytes = self._held(now)
        return reads

    def finish(self, now: Now) -> Any:
        """Go on to the end: what the network answers; None where it had to end before."""
        return None if self._body.dead else self._go_on(None, now)

    def close(self) -> None:
        """End it, where it is."""
        if self._body:
            self._target = None
            with torch.no_grad():  # as when it began: what the network opened since then puts that back
                self._body.throw(GreenletExit)

    def _go_on(self, target: int | None, now: Now) -> Any:
        self._target, self._now, self._outside = target, now, _surroundings()
        self._buffers = _buffers(self._network)
        return self._body.switch()

    def _run(self) -> Any:
        try:
            with _Listening(self._call, self._see):
                return run_batch(self._task, self._network, self.batch, self._index)
        except Reached:
            return None

    def _call(self, call: Call) -> Tensor:
        key = id(call.given["weight"])
        self._passed.add(key)
        if key == self._target:
            return self._wanted(call)
        z = call()
        self._used.add((call.given["weight"], call.given.get("bias")), self._now)
        return z

    def _wanted(self, call: Call) -> Tensor:
        """A call of the layer that is to be read; where it is the last one, others run before it is computed."""
        layer = self._layer
        last = len(self._reads) + 1 == layer.calls
        z = call() if self._with_outputs or not last else None
        own = _Used()
        own.add((call.given["weight"], call.given.get("bias")), self._now)
        read = call.read(z)
        self._reads.append(read if last else read.copied())
        if last:
            self._wait()
            if z is None or not own.unchanged(self._now):
                z = self._with_new_weights(call, layer)
        assert z is not None
        for name in (layer.weight, layer.bias):
            self._used.add(self._now.parts(name) if name else (), self._now)
        return z

    def _wait(self) -> None:
        """Let others run."""
        if _surroundings() != self._outside or _buffers(self._network) != self._buffers:
            raise Reached  # they would run inside of what the network has opened, and buffers are put back meanwhile
        self._kept = _Attributes(self._network.modules())
        with uncaught():
            self._body.parent.switch()

    def _with_new_weights(self, call: Call, layer: Layer) -> Tensor:
        weights = {"weight": self._now.dense(layer.weight)}
        if layer.bias is not None and call.given.get("bias") is not None:
            weights["bias"] = self._now.dense(layer.bias)
        return call(**weights)

    def _see(self, given: Sequence[Any], results: Sequence[Tensor]) -> None:
        """A function was called with these and gave those."""
        self._used.add(given, self._now)
        self._results += map(weakref.ref, results)

    def _held(self, now: Now) -> int:
        """The bytes of all tensors that are alive in it, but those of the network."""
        self._results = [ref for ref in self._results if ref() is not None]
        own = {tensor.untyped_storage().data_ptr() for tensor in now.tensors.values()}
        alive = [tensor.untyped_storage() for ref in self._results if (tensor := ref()) is not None]
        return sum({each.data_ptr(): each.nbytes() for each in alive if each.data_ptr() not in own}.values())


class _Attributes:
    """What modules keep besides parameters, buffers and parts: others that run meanwhile may leave something else."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._objects = list(_kept(self._modules))
        self._versions = [version(each) for each in self._objects if isinstance(each, Tensor)]

    def unchanged(self) -> bool:
        """Whether it is all the same, not only equal."""
        now = _Attributes(self._modules)
        return (
            len(now._objects) == len(self._objects)
            and all(a is b for a, b in zip(now._objects, self._objects, strict=True))
            and now._versions == self._versions
        )


def _kept(modules: Iterable[nn.Module]) -> Iterator[object]:
    for module in modules:
        for name, value in vars(module).items():
            if name not in _OF_MODULES:
                yield value
                if isinstance(value, dict):
                    yield from (*value, *value.values())
                elif isinstance(value, (list, tuple, set)):
                    yield from value


_OF_MODULES = frozenset(vars(nn.Module()))


def _buffers(network: nn.Module) -> list[tuple[int, object]]:
    """Which buffers there are, and how often they were written to."""
    return [(id(buffer), version(buffer)) for buffer in network.buffers()]


class _Listening(LayerCalls):
    """Hands on layers' calls, and what functions were given and gave; of those that call layers, what they gave."""

    def __init__(self, take: Callable[[Call], Tensor], see: Callable[[Sequence[Any], Sequence[Tensor]], None]) -> None:
        super().__init__(take)
        self._see = see

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        calls = self.calls
        result = super().__torch_function__(func, types, args, kwargs)
        found = [each for each in _flat((result,)) if isinstance(each, Tensor)]
        asked = getattr(func, "__name__", "") == "__get__" and not found  # for a shape, a dtype, a device
        given = () if asked or self.calls > calls else (*_flat(args), *_flat((kwargs or {}).values()))
        self._see(given, found)
        return result


def interleaved(
    task: Task, network: nn.Module, dense: Callable[[str], Tensor], layers: Sequence[Layer], batches: Sequence[Batch]
) -> list[Any]:
    """What a network answers to some batches while it runs on all of them, from layer to layer by turns.

    None where it cannot wait at one of the layers.
    """
    now = Now(network, dense)
    forwards = [Forward(task, network, batch, index) for index, batch in enumerate(batches)]
    try:
        for layer in layers:
            with evaluating(network):
                for forward in forwards:
                    if forward.can_reach(layer, now):
                        forward.read(layer, now, outputs=False)
        with evaluating(network):
            return [forward.finish(now) for forward in forwards]
    finally:
        for forward in forwards:
            forward.close()


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Arguments or results of a function, those in lists by themselves."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from value
        else:
            yield value


def _surroundings() -> tuple[Any, ...]:
    """What a network can set for all that runs inside a `with` of its forward."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _AUTOCAST],
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._functorch.peek_interpreter_stack() is None,
        torch._C._is_fwd_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        (torch.cuda.current_device(), torch.cuda.current_stream()) if torch.cuda.is_initialized() else None,
        id(warnings.filters),
        id(sys.stdout),
        id(sys.stderr),
    )
