"""What the networks of a joint model can have in common: shared weights, and buffers that may be equal."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from taskzip.zipped.blocks import Blocks, spec_of, weights_of

# While a function mode is on, torch takes another way through its own attention, and the last bits differ.
_SENSITIVE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)

_Slot = tuple[Mapping[str, Tensor | None], str]
"""Where a module holds a parameter or a buffer."""


class Inventory:
    """Found once, for looking through all modules takes longer than a small layer; `holds` says whether it still does.

    Args:
        networks: of the tasks.

    Attributes:
        weights: the parameters of several networks; blocks of weights only where all of the weight is shared, or where
            groups of units are computed one by one.
        apart: those of layers that compute groups of units one by one.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        named = [list(network.named_modules()) for network in networks]
        self._modules = list({module: None for each in named for _, module in each})
        self._children = [(m._modules, list(m._modules.values())) for m in self._modules if m._modules]
        self._networks = list(networks)
        self._sensitive = any(isinstance(m, _SENSITIVE) or "_orig_mod" in m._modules for m in self._modules)
        slots = _shared(named)
        self._places = [(place, parameter) for parameter, places in slots.values() for place in places]
        self.weights = [parameter for parameter, _ in slots.values()]
        one_by_one = [p for m in self._modules if isinstance(m, Blocks) and spec_of(m).apart for p in _own(m)]
        self.apart = [parameter for parameter in one_by_one if id(parameter) in slots]
        self._buffers = list(_alike(named, slots.keys()))

    def holds(self, networks: Sequence[nn.Module]) -> bool:
        """Whether these are the same modules with the same shared weights; other parameters may have changed."""
        return (
            self._networks == networks
            and all(list(now.values()) == children for now, children in self._children)
            and all(parameters.get(name) is parameter for (parameters, name), parameter in self._places)
        )

    def runs_apart(self) -> bool:
        """Whether each network has to run by itself, or nothing can be common."""
        return (
            self._sensitive
            or not self.weights
            # `_compiled_call_impl` is there after module.compile().
            or any(module.training or module._compiled_call_impl is not None for module in self._modules)
            or any(tensor.is_meta or tensor.is_inference() for tensor in (*self.weights, *self._all_buffers()))
        )

    def equal_buffers(self) -> Iterator[list[Tensor]]:
        """Buffers of one name and the same values, such as the mean of the images."""
        for slots in self._buffers:
            groups: list[list[Tensor]] = []
            for buffer in (buffers.get(name) for buffers, name in slots):
                if buffer is not None:
                    group = next((each for each in groups if _equal(each[0], buffer)), None)
                    if group is None:
                        groups.append([buffer])
                    else:
                        group.append(buffer)
            yield from (group for group in groups if len(group) > 1)

    def _all_buffers(self) -> Iterator[Tensor]:
        found = (buffers.get(name) for slots in self._buffers for buffers, name in slots)
        return (buffer for buffer in found if buffer is not None)


def _shared(named: Sequence[Sequence[tuple[str, nn.Module]]]) -> dict[int, tuple[Tensor, list[_Slot]]]:
    """By their ids, the parameters that several networks use, and where they are."""
    users: dict[int, set[int]] = {}
    for network, modules in enumerate(named):
        for _, module in modules:
            for parameter in _own(module):
                users.setdefault(id(parameter), set()).add(network)
    found: dict[int, tuple[Tensor, list[_Slot]]] = {}
    for module in (module for modules in named for _, module in modules):
        own = _own(module)
        several = [parameter for parameter in own if len(users[id(parameter)]) > 1]
        if len(several) == len(own) or not isinstance(module, Blocks) or spec_of(module).apart:
            for name, each in module._parameters.items():
                if each is not None and len(users.get(id(each), ())) > 1:
                    found.setdefault(id(each), (each, []))[1].append((module._parameters, name))
    return found


def _alike(named: Sequence[Sequence[tuple[str, nn.Module]]], weights: Collection[int]) -> Iterator[list[_Slot]]:
    """Buffers of the same name in several networks.

    Those of batch-norm with a scale of its own are left out: nothing that it computes is common.
    """
    found: dict[tuple[str, str], list[_Slot]] = {}
    for path, module in (item for modules in named for item in modules):
        if isinstance(module, _BatchNorm) and module.weight is not None and id(module.weight) not in weights:
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None:
                found.setdefault((path, name), []).append((module._buffers, name))
    yield from (slots for slots in found.values() if len(slots) > 1)


def _own(module: nn.Module) -> list[Tensor]:
    if isinstance(module, Blocks):  # by what units are multiplied later does not matter
        return list(weights_of(module))
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and one.device == other.device and torch.equal(one, other))
