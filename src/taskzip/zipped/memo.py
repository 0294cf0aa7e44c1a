"""What torch has computed, numbered by how it came about, so that it need not be computed again (value numbering).

The number of a result stands for the function, its settings, and the numbers of the tensors that went in, beginning
with those that are called common. Equal numbers are equal values; what has no number is computed as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SETTINGS = {bool, int, str, type, type(None), type(...), torch.Size}
_SETTINGS |= {torch.dtype, torch.device, torch.memory_format, torch.layout}
# Known by other names than those of their operators.
_PURE = {"interpolate", "normalize", "float", "half", "double"}
_PURE |= {"__getitem__", "__rsub__", "__rdiv__", "__rpow__", "__rmatmul__"}
# Undetermined or random, though their operators are not marked so.
_IMPURE = {"empty_like", "new_empty", "new_empty_strided", "fractional_max_pool2d", "fractional_max_pool3d"}


class Memo(TorchFunctionMode):
    """While it is entered, pure functions of common tensors are computed once.

    Numbers and results hold for one state of a tensor only: torch counts in `_version` how often it was written to,
    also by way of views.

    Args:
        common: groups of tensors; those of a group have the same values.
    """

    def __init__(self, common: Iterable[list[Tensor]]) -> None:
        super().__init__()
        self._known: dict[Hashable, int] = {}
        self._numbers: dict[int, tuple[Tensor, int, int]] = {}
        self._results: dict[int, tuple[Tensor, int]] = {}
        self._copies: set[int] = set()  # numbers of results that nobody else holds
        self._given: list[tuple[Tensor, int]] = []
        for number, group in enumerate(common):
            self._known[number] = number
            for tensor in filter(_plain, group):
                self._note(tensor, number)
        devices = {tensor.device.type for tensor, _, _ in self._numbers.values()}
        self._devices = sorted(filter(torch.amp.is_autocast_available, devices))

    @property
    def spoilt(self) -> bool:
        """Whether someone wrote into a result that was given to others too."""
        return any(tensor._version != version for tensor, version in self._given)

    def gave(self, value: Any) -> bool:
        """Whether a value, or what it is a view of, was given to others too."""
        return _plain(value) and _memory(value) in {_memory(tensor) for tensor, _ in self._given}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        parts: list[Any] = []
        _flatten((args, kwargs), parts)
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if not any(id(tensor) in self._numbers for tensor in tensors):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        writes = bool(kwargs.get("inplace")) or (name[-1:] == "_" and name[-2:] != "__")
        pure = _is_pure(name, args, kwargs)
        number = self._number_of(func, parts) if pure else None
        if writes:
            self._keep(tensors[0])
        elif number is not None and (found := self._recall(number)) is not None:
            return found
        before = [_version(tensor) for tensor in tensors]
        result = func(*args, **kwargs)
        untouched = before == [_version(tensor) for tensor in tensors]
        if number is not None and (writes or untouched) and _plain(result) and not result.is_inference():
            self._store(number, result, tensors, writes)
        elif not pure and type(result) not in _SETTINGS:
            self._forget(tensors)
        return result

    def _number(self, tensor: Tensor) -> int | None:
        found = self._numbers.get(id(tensor))
        return found[2] if found and found[1] == _version(tensor) else None

    def _note(self, tensor: Tensor, number: int) -> None:
        self._numbers[id(tensor)] = (tensor, _version(tensor), number)

    def _number_of(self, func: Callable[..., Any], parts: list[Any]) -> int | None:
        """The number of a call; none where an argument has none or is not understood."""
        key: list[Any] = [func, torch.is_grad_enabled()]
        for device in self._devices:
            key += (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for part in parts:
            kind = type(part)
            if kind in _SETTINGS:
                key += [kind, part]
            elif kind is float:
                key.append(repr(part))  # 0.0 and -0.0 are equal
            elif isinstance(part, Tensor) and (number := self._number(part)) is not None:
                key.append(number)
            else:
                return None
        return self._known.setdefault(tuple(key), len(self._known))

    def _store(self, number: int, result: Tensor, tensors: list[Tensor], writes: bool) -> None:
        if writes:
            self._note(result, number)
        elif not any(result is tensor for tensor in tensors):
            self._note(result, number)
            # A view is computed anew: it has to be one of the caller's own tensor.
            if not any(_plain(tensor) and _memory(tensor) == _memory(result) for tensor in tensors):
                self._results[number] = (result, result._version)
                self._copies.discard(number)

    def _recall(self, number: int) -> Tensor | None:
        result, version = self._results.get(number, (None, None))
        if result is None or result._version != version:
            return None
        if number in self._copies:
            result = result.clone()
        else:
            self._given.append((result, result._version))
        self._note(result, number)
        return result

    def _keep(self, written: Tensor) -> None:
        """Before a tensor is written into: keep a copy of the result that lies there."""
        if not _plain(written):
            return
        for number, (result, version) in self._results.items():
            if number not in self._copies and result._version == version and _memory(result) == _memory(written):
                copy = result.clone()
                self._results[number] = (copy, copy._version)
                self._copies.add(number)

    def _forget(self, tensors: list[Tensor]) -> None:
        """A function that is not known may keep its arguments and write to them later."""
        for tensor in tensors:
            number = self._number(tensor)
            if number is not None:
                del self._numbers[id(tensor)]
                self._results.pop(number, None)


def _flatten(value: Any, parts: list[Any]) -> None:
    """Everything inside lists, tuples, dicts and slices, with their types and lengths."""
    if isinstance(value, (list, tuple)):
        parts += (type(value), len(value))
        for each in value:
            _flatten(each, parts)
    elif isinstance(value, dict):
        for key in sorted(value):
            parts.append(key)
            _flatten(value[key], parts)
    elif isinstance(value, slice):
        _flatten((slice, value.start, value.stop, value.step), parts)
    else:
        parts.append(value)


def _is_pure(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the function of this name, called like this, gives the same for the same arguments."""
    if name == "scaled_dot_product_attention":
        return len(args) < 5 and kwargs.get("dropout_p", 0.0) == 0
    return name in _PURE or (_is_operator(name) and (not _is_random(name) or kwargs.get("training") is False))


@cache
def _is_operator(name: str) -> bool:
    return name not in _IMPURE and bool(_overloads(name))


@cache
def _is_random(name: str) -> bool:
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in _overloads(name))


def _overloads(name: str) -> list[Any]:
    found = getattr(torch.ops.aten, name, None) if name.isidentifier() and not name.startswith("__") else None
    return [] if found is None else [getattr(found, overload) for overload in found.overloads()]


def _plain(value: Any) -> bool:
    """Whether it is a tensor of torch's own kind, with memory of its own."""
    return type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _version(tensor: Tensor) -> int:
    """How often it was written to; outside of inference mode its tensors cannot be."""
    return 0 if tensor.is_inference() else tensor._version
