"""What torch has computed, numbered by how it came about, so that it need not be computed again.

The number of a result stands for the function, its settings, and the numbers of the tensors that went in, beginning
with those that are called common. Equal numbers are equal values; what has no number is computed as ever. This is
common-subexpression elimination by value numbering (J. Cocke, J. T. Schwartz, *Programming Languages and Their
Compilers*, 1970), done while the program runs.

Where a layer computes shared units by themselves, what they read is part of a larger result that is not common. There
the values decide: if they equal those that an earlier task gave to the same weights, the answer is known too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import TensorWeakRef

_SETTINGS = {bool, int, str, type, type(None), type(...), torch.Size}
_SETTINGS |= {torch.dtype, torch.device, torch.memory_format, torch.layout}
_SIMPLE = {bool, int, float, str, type(None), Tensor, nn.Parameter}
_FACTS = (_SETTINGS | {float, complex}) - {type(None)}
# Known by other names than those of their operators.
_PURE = {"interpolate", "normalize", "float", "half", "double", "local_response_norm", "grid_sample", "fold"}
_PURE |= {"softmin", "softsign", "tanhshrink"}
_PURE |= {"__getitem__", "__rsub__", "__rdiv__", "__rpow__", "__rmatmul__"}
# Functions of an input and a weight, for which equal inputs are looked up by their values.
_LAYERS = {F.linear, torch.conv1d, torch.conv2d, torch.conv3d}
# They change more of a tensor than what is counted.
_EFFECTS = {"requires_grad_", "retain_grad", "detach_", "set_", "set_data", "resize_", "resize_as_"}
# Undetermined or random, though their operators are not marked so.
_IMPURE = {"empty_like", "new_empty", "new_empty_strided", "fractional_max_pool2d", "fractional_max_pool3d"}
_IMPURE |= _EFFECTS


class Memo(TorchFunctionMode):
    """While it is entered, pure functions of common tensors are computed once.

    Numbers and results hold for one state of a tensor only: torch counts in `_version` how often it was written to,
    also by way of views. Results are kept until the last user has taken them; all else is referred to weakly.

    Args:
        common: groups of tensors; those of a group have the same values.
        by_value: weights whose inputs are compared by their values, where no gradient depends on these.

    Attributes:
        last: whether nobody comes after the present user, so that nothing new is kept and what is recalled is let go.
    """

    def __init__(self, common: Iterable[list[Tensor]], by_value: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._by_value = {id(weight) for weight in by_value}
        self._inputs: dict[int, list[tuple[Tensor, int, int]]] = {}  # by the weight's number
        self.last = False
        self._known: dict[Hashable, int] = {}
        self._numbers: dict[int, tuple[TensorWeakRef, int, int]] = {}  # by the id of the tensor
        self._results: dict[int, tuple[Tensor, int]] = {}
        self._copies: set[int] = set()  # numbers of results that nobody else holds
        self._given: list[tuple[TensorWeakRef, int]] = []
        self._detached: list[Tensor] = []
        self._exposed = False
        devices = set()
        for number, group in enumerate(common):
            self._known[number] = number
            for tensor in filter(_plain, group):
                self._note(tensor, number)
                devices.add(tensor.device.type)
        self._devices = sorted(filter(torch.amp.is_autocast_available, devices))

    @property
    def spoilt(self) -> bool:
        """Whether someone wrote, or can write unseen, into a result that was given to others too."""
        return self._exposed or any(tensor._version != version for tensor, version in self._alive())

    def gave(self, value: Any) -> bool:
        """Whether a value, or what it is a view of, was given to others too."""
        return _plain(value) and _memory(value) in {_memory(tensor) for tensor, _ in self._alive()}

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
        if func in _LAYERS:
            self._recognise(*tensors[:2])
        writes = bool(kwargs.get("inplace")) or (name[-1:] == "_" and name[-2:] != "__")
        pure = _is_pure(func, name, args, kwargs)
        number = self._number_of(func, parts) if pure else None
        if name == "detach":  # the result may outlive the tensor, on which one sees whether it was written into
            self._detached += tensors
        if writes:
            self._keep(tensors[0])
        elif number is not None and (found := self._recall(number)) is not None:
            return found
        before = [_version(tensor) for tensor in tensors]
        result = func(*args, **kwargs)
        untouched = before == [_version(tensor) for tensor in tensors]
        if number is not None and (writes or untouched):
            self._store(number, result, tensors, writes)
        elif not pure and _exposes(name, result, tensors):
            self._forget(tensors)
        return result

    def _alive(self) -> list[tuple[Tensor, int]]:
        """What was given to others and still is in use, with the version that they got."""
        held = [(reference(), version) for reference, version in self._given]
        return [(tensor, version) for tensor, version in held if tensor is not None]

    def _number(self, tensor: Tensor) -> int | None:
        reference, version, number = self._numbers.get(id(tensor), (None, 0, 0))
        known = reference is not None and reference() is tensor and version == _version(tensor)
        return number if known else None

    def _note(self, tensor: Tensor, number: int) -> None:
        self._numbers[id(tensor)] = (TensorWeakRef(tensor), _version(tensor), number)

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

    def _recognise(self, x: Tensor, weight: Tensor) -> None:
        """Give what a layer reads the number of equal values that another task gave to the same weight."""
        key, own = self._number(weight), self._number(x)
        if id(weight) not in self._by_value or key is None or not _comparable(x):
            return
        seen = [each for each in self._inputs.pop(key, []) if each[0]._version == each[1]]
        alike = (number for other, _, number in seen if number == own or _equal(x, other))
        number = next(alike, own)
        if number is None and not self.last:
            number = self._known.setdefault(("read", len(self._known)), len(self._known))
        if number is not None:
            self._note(x, number)
        if not self.last:
            new = all(number != each[2] for each in seen)
            self._inputs[key] = [*seen, (x, x._version, number)] if new and number is not None else seen

    def _store(self, number: int, result: Any, tensors: list[Tensor], writes: bool) -> None:
        if isinstance(result, (tuple, list)):  # of `chunk`, `topk` and their kind only the parts have numbers
            for i, part in enumerate(result):
                if _usable(part) and not any(part is tensor for tensor in tensors):
                    self._note(part, self._known.setdefault((number, i), len(self._known)))
        elif not _usable(result):
            return
        elif writes:
            self._note(result, number)
        elif not any(result is tensor for tensor in tensors):
            self._note(result, number)
            # A view is computed anew: it has to be one of the caller's own tensor.
            if not self.last and not any(_plain(tensor) and _memory(tensor) == _memory(result) for tensor in tensors):
                self._results[number] = (result, result._version)
                self._copies.discard(number)

    def _recall(self, number: int) -> Tensor | None:
        result, version = self._results.get(number, (None, None))
        if result is None or result._version != version:
            return None
        if self.last:
            del self._results[number]
        if number not in self._copies:
            self._given.append((TensorWeakRef(result), result._version))
        elif not self.last:
            result = result.clone()
        self._note(result, number)
        return result

    def _keep(self, written: Tensor) -> None:
        """Before a tensor is written into: keep a copy of the result that lies there, if anyone can need it."""
        if self.last or not _plain(written):
            return
        for number, (result, version) in self._results.items():
            if number not in self._copies and result._version == version and _memory(result) == _memory(written):
                copy = result.clone()
                self._results[number] = (copy, copy._version)
                self._copies.add(number)

    def _forget(self, tensors: list[Tensor]) -> None:
        """Nothing that lies where these do holds any longer: it may be written to without being counted."""
        places = {_memory(tensor) for tensor in tensors if _plain(tensor)}
        for name, (reference, _, _) in list(self._numbers.items()):
            tensor = reference()
            if tensor is None or _memory(tensor) in places:
                del self._numbers[name]
        for number, (result, _) in list(self._results.items()):
            if _memory(result) in places:
                del self._results[number]
        for key, seen in self._inputs.items():
            self._inputs[key] = [each for each in seen if _memory(each[0]) not in places]
        self._exposed |= any(_memory(tensor) in places for tensor, _ in self._alive())


def _flatten(values: Iterable[Any], parts: list[Any]) -> None:
    """Everything inside lists, tuples, dicts and slices, with their types and lengths."""
    for value in values:
        if type(value) in _SIMPLE:
            parts.append(value)
        elif isinstance(value, (list, tuple)):
            parts += (type(value), len(value))
            _flatten(value, parts)
        elif isinstance(value, dict):
            parts += (dict, len(value))
            _flatten((each for item in value.items() for each in item), parts)
        elif isinstance(value, slice):
            parts.append(slice)
            _flatten((value.start, value.stop, value.step), parts)
        else:
            parts.append(value)


def _is_pure(func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the function of this name, called like this, gives the same for the same arguments and does no more."""
    if not getattr(func, "_qualified_op_name", "aten::").startswith("aten::"):  # an operator that others wrote
        return False
    if name == "scaled_dot_product_attention":
        return len(args) < 5 and kwargs.get("dropout_p", 0.0) == 0
    if name in ("batch_norm", "instance_norm"):  # with the statistics of the batch they write into the running ones
        running = kwargs.get("running_mean", args[1] if len(args) > 1 else None)
        return running is None or not kwargs.get("training", kwargs.get("use_input_stats", True))
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


def _exposes(name: str, result: Any, tensors: list[Tensor]) -> bool:
    """Whether a function that is not known may have opened a way to its arguments on which writing is not counted."""
    if name in _EFFECTS or "data_ptr" in name:
        return True
    parts: list[Any] = []
    _flatten([result], parts)
    places = {_memory(tensor) for tensor in tensors if _plain(tensor)}
    return any(
        # `x.data` lies where x does and is no view of it.
        _memory(part) in places and not part._is_view() and not any(part is tensor for tensor in tensors)
        if _plain(part)
        else type(part) not in _FACTS
        for part in parts
    )


def _plain(value: Any) -> bool:
    """Whether it is a tensor of torch's own kind, with memory of its own."""
    return type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided


def _usable(value: Any) -> bool:
    """Whether a result can have a number."""
    return _plain(value) and not value.is_inference()


def _comparable(tensor: Tensor) -> bool:
    """Whether values may decide: an equal tensor that came about otherwise has other gradients."""
    captured = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    return _usable(tensor) and not tensor.requires_grad and not captured


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _version(tensor: Tensor) -> int:
    """How often it was written to; outside of inference mode its tensors cannot be."""
    return 0 if tensor.is_inference() else tensor._version
