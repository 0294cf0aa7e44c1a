"""Tasks on one input, with what they have in common computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taskzip.errors import InputError
from taskzip.zipped.blocks import Blocks
from taskzip.zipped.memo import Memo

# While a function mode is on, torch takes another way through its own attention, and the last bits differ.
_SENSITIVE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


class _WrittenInto(Exception):
    """A network wrote into a result that another one has too."""


def run_jointly(networks: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every network's output, the same as if each had run by itself.

    In training mode each does run by itself, for dropout and batch statistics are its own; so it does while torch
    compiles or exports. What is in common stays in memory until all have run.
    """
    if torch.compiler.is_compiling() or any(map(_runs_alone, networks.values())):
        return _run_apart(networks, args, kwargs)
    weights = _shared_weights(list(networks.values()))
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not weights or any(map(torch._C._functorch.is_functorch_wrapped_tensor, [*weights, *given])):
        return _run_apart(networks, args, kwargs)
    grad = torch.is_grad_enabled()
    # Inference mode does not count how often a tensor was written to, which the memo has to know.
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, (args, kwargs))
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in inputs]
        memo = Memo([*([tensor] for tensor in (*inputs, *weights)), *_equal_buffers(list(networks.values()))])
        try:
            return {name: _run(network, memo, args, kwargs) for name, network in networks.items()}
        except _WrittenInto:
            if versions != [tensor._version for tensor in inputs]:
                raise InputError(
                    "the networks write into their input and into what they have in common: call them one by one, "
                    "zipped[name](...), each on a copy."
                ) from None
            return _run_apart(networks, args, kwargs)


def _run_apart(networks: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: network(*args, **kwargs) for name, network in networks.items()}


def _runs_alone(network: nn.Module) -> bool:
    return any(module.training or isinstance(module, _SENSITIVE) for module in network.modules())


def _run(network: nn.Module, memo: Memo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with memo:
        output = network(*args, **kwargs)
    if memo.spoilt:
        raise _WrittenInto
    leaves, form = pytree.tree_flatten(output)
    given = [memo.gave(leaf) for leaf in leaves]
    if not any(given):
        return output
    return pytree.tree_unflatten([x.clone() if also else x for x, also in zip(leaves, given, strict=True)], form)


def _shared_weights(networks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The parameters of several networks, blocks of weights only where all of the weight is shared."""
    users = Counter(parameter for network in networks for parameter in network.parameters())
    holders = dict.fromkeys(module for network in networks for module in network.modules())
    found: dict[nn.Parameter, None] = {}
    for module in holders:
        own = list(module.parameters(recurse=False))
        shared = [parameter for parameter in own if users[parameter] > 1]
        if len(shared) == len(own) or not isinstance(module, Blocks):
            found |= dict.fromkeys(shared)
    return list(found)


def _equal_buffers(networks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Buffers of one name and the same values, such as the mean of the images."""
    others = [dict(network.named_buffers()) for network in networks[1:]]
    for name, buffer in networks[0].named_buffers():
        found = [other[name] for other in others if name in other and _equal(other[name], buffer)]
        if found:
            yield [buffer, *found]


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
