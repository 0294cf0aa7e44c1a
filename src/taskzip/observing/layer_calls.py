"""The moments at which a network hands weights to `linear` or to a convolution, and what these read and answer there.

The user's own modules run. A layer is recognised by its weight, so that padding, stride and functional calls need no
rules of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taskzip.errors import GraphError
from taskzip.graph import Layer
from taskzip.tasks import Batch, Task, run_batch

_linear = F.linear
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_SLIDE = {"stride": 1, "padding": 0, "dilation": 1}


class Reached(BaseException):
    """Nothing behind the layer is needed. No forward may catch it as an Exception."""


class Call(NamedTuple):
    """One call of `linear` or of a convolution that has not been computed yet."""

    func: Callable[..., Tensor]
    given: dict[str, Any]

    def __call__(self, **instead: Tensor) -> Tensor:
        """What it answers, with other weights if these are given."""
        return self.func(**self.given | instead)

    def read(self, z: Tensor | None) -> Read:
        """What it reads, and its answer `z` if that was computed."""
        slide = {name: self.given[name] for name in _SLIDE} if "stride" in self.given else None
        return Read(self.given["input"], z, slide)


class Read(NamedTuple):
    """One call of a layer: its input, its output if that was computed, and for a convolution how it slides."""

    x: Tensor
    z: Tensor | None
    slide: dict[str, Any] | None

    def copied(self) -> Read:
        """The same in tensors of its own: what comes after the call may write into them."""
        return self._replace(x=self.x.clone(), z=None if self.z is None else self.z.clone())


class LayerCalls(TorchFunctionMode):
    """Hands on every call of `linear` and of a convolution, to be computed or not.

    Functions that torch writes in Python on top of others, `multi_head_attention_forward` for one, run with the mode
    off; inside them `linear` is caught by its name.
    """

    def __init__(self, take: Callable[[Call], Tensor]) -> None:
        """What to do with a call; it gives the answer."""
        super().__init__()
        self._take = take
        self.calls = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _linear:
            return self._call(func, {}, *args, **kwargs)
        if func in _CONVOLUTIONS:
            return self._call(func, _SLIDE, *args, **kwargs)
        if isinstance(func, FunctionType):
            with _linear_is(partial(self._call, _linear, {})):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _call(self, func: Callable[..., Tensor], slide: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return self._take(Call(func, slide | dict(zip(_ARGUMENTS, args, strict=False)) | kwargs))


@contextmanager
def _linear_is(function: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, torch's modules and functions call something else instead of `linear`."""
    before, F.linear = F.linear, function
    try:
        yield
    finally:
        F.linear = before


@contextmanager
def uncaught() -> Iterator[None]:
    """Inside, `linear` is torch's own again, for whoever is no part of a forward that is being listened to."""
    with _linear_is(_linear):
        yield


def run_to(
    task: Task,
    model: nn.Module,
    layers: Sequence[Layer],
    take: Callable[[Layer, Read], None],
    batch: Batch,
    index: int,
    *,
    outputs: bool = True,
) -> Mapping[str, int]:
    """Run a batch as far as the last call of these layers; how many of the calls of each are missing.

    What comes after a call may write into what was read. Without `outputs` the last of all calls is not computed.
    """
    torch.clear_autocast_cache()
    weights = {id(model.get_parameter(layer.weight)): layer for layer in layers}
    left = {layer.name: layer.calls for layer in layers}

    def called(call: Call) -> Tensor:
        layer = weights.get(id(call.given["weight"]))
        if layer is None:
            return call()
        last = sum(left.values()) == 1
        z = call() if outputs or not last else None
        take(layer, call.read(z))
        left[layer.name] -= 1
        if not any(left.values()):
            raise Reached
        assert z is not None
        return z

    try:
        with LayerCalls(called):
            run_batch(task, model, batch, index)
    except Reached:
        pass
    return left


def check_calls(task: Task, layer: Layer, left: int, index: int) -> None:
    """Whether a layer was called as often as in the exported graph.

    Raises:
        GraphError: `left` calls are missing.
    """
    if left:
        raise GraphError(
            f"task {task.name!r}, layer {layer.name!r}: called {layer.calls - left} times on batch {index}, but "
            f"{layer.calls} times in the exported graph: the forward must be the same on every batch."
        )
