"""Tasks on one input, with what they have in common computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from taskzip.errors import InputError
from taskzip.zipped.blocks import Blocks, spec_of
from taskzip.zipped.memo import Memo

# While a function mode is on, torch takes another way through its own attention, and the last bits differ.
_SENSITIVE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


class _WrittenInto(Exception):
    """A network wrote into a result that another one has too."""


def run_jointly(networks: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every network's output, the same as if each had run by itself, one after another.

    What they have in common is computed once: results of pure functions of the input, of shared weights and of equal
    buffers, and of layers that compute shared units by themselves, where these read equal values (without gradients,
    and to rounding). Results, and what such layers read, stay in memory until the last network has taken them.

    Each network does run by itself where any is in training mode, for dropout and batch statistics are its own; where
    any holds torch's own attention or compiled parts; and while torch compiles, traces or exports.

    Raises:
        InputError: networks that write into their input, and into a result that others have too: they would have to
            run again by themselves, and their input is no more.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return _run_apart(networks, args, kwargs)
    modules = [dict(network.named_modules()) for network in networks.values()]
    if any(_runs_alone(module) for each in modules for module in each.values()):
        return _run_apart(networks, args, kwargs)
    weights = _shared_weights(modules)
    held = [
        *weights.values(),
        *(buffer for each in modules for module in each.values() for buffer in _own(module._buffers)),
    ]
    if not weights or any(map(_unusual, [*_tensors((args, kwargs)), *held])) or any(t.is_inference() for t in held):
        return _run_apart(networks, args, kwargs)
    grad = torch.is_grad_enabled()
    # Inference mode does not count how often a tensor was written to, which the memo has to know.
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, (args, kwargs))
        inputs = _tensors((args, kwargs))
        versions = [tensor._version for tensor in inputs]
        common = [*([tensor] for tensor in (*inputs, *weights.values())), *_equal_buffers(modules, weights)]
        memo = Memo(common, _apart(modules))
        outputs = {}
        try:
            for left, (name, network) in zip(reversed(range(len(networks))), networks.items(), strict=True):
                memo.last = left == 0
                outputs[name] = _run(network, memo, args, kwargs)
        except _WrittenInto:
            if versions != [tensor._version for tensor in inputs]:
                raise InputError(
                    "the networks write into their input and into what they have in common: call them one by one, "
                    "zipped[name](...), each on a copy."
                ) from None
            return _run_apart(networks, args, kwargs)
        return outputs


def _run_apart(networks: Mapping[str, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: network(*args, **kwargs) for name, network in networks.items()}


def _runs_alone(module: nn.Module) -> bool:
    return (
        module.training
        or isinstance(module, _SENSITIVE)
        or "_orig_mod" in module._modules  # compiled by torch.compile(module)
        or module._compiled_call_impl is not None  # compiled by module.compile()
    )


def _unusual(tensor: Tensor) -> bool:
    """Whether a tensor has no values of its own."""
    return tensor.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _run(network: nn.Module, memo: Memo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A network's output, none of whose tensors lies where another one's does."""
    with memo:
        output = network(*args, **kwargs)
    if memo.spoilt:
        raise _WrittenInto
    leaves, form = pytree.tree_flatten(output)
    given = [memo.gave(leaf) for leaf in leaves]
    if not any(given):
        return output
    return pytree.tree_unflatten([x.clone() if also else x for x, also in zip(leaves, given, strict=True)], form)


def _shared_weights(modules: Sequence[Mapping[str, nn.Module]]) -> dict[int, Tensor]:
    """The parameters of several networks by their ids.

    Blocks of weights only where all of the weight is shared, or where groups of units are computed one by one.
    """
    users = Counter(
        i for each in modules for i in {id(p) for module in each.values() for p in _own(module._parameters)}
    )
    found: dict[int, Tensor] = {}
    for module in (module for each in modules for module in each.values()):
        own = _own(module._parameters)
        shared = {id(parameter): parameter for parameter in own if users[id(parameter)] > 1}
        if len(shared) == len(own) or not isinstance(module, Blocks) or spec_of(module).apart:
            found |= shared
    return found


def _apart(modules: Sequence[Mapping[str, nn.Module]]) -> Iterator[Tensor]:
    """Blocks of layers that compute groups of units one by one."""
    for module in (module for each in modules for module in each.values()):
        if isinstance(module, Blocks) and spec_of(module).apart:
            yield from _own(module._parameters)


def _equal_buffers(modules: Sequence[Mapping[str, nn.Module]], weights: Mapping[int, Tensor]) -> Iterator[list[Tensor]]:
    """Buffers of one name and the same values, such as the mean of the images.

    Those of batch-norm with a scale of its own are left out: nothing that it computes is common.
    """
    found: dict[tuple[str, str], list[list[Tensor]]] = {}
    for path, module in (item for each in modules for item in each.items()):
        if isinstance(module, _BatchNorm) and module.weight is not None and id(module.weight) not in weights:
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None:
                groups = found.setdefault((path, name), [])
                group = next((each for each in groups if _equal(each[0], buffer)), None)
                if group is None:
                    groups.append([buffer])
                else:
                    group.append(buffer)
    for groups in found.values():
        yield from (group for group in groups if len(group) > 1)


def _own(tensors: Mapping[str, Tensor | None]) -> list[Tensor]:
    """Those that a module has, of its parameters or buffers."""
    return [tensor for tensor in tensors.values() if tensor is not None]


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and one.device == other.device and torch.equal(one, other))
