"""Copies of networks as training scripts leave them: compiled, or holding tensors that remember how they came about."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taskzip.errors import InputError

_WRAPPED = "_orig_mod"  # where torch.compile(module) keeps the module
_COMPILED = "_torchdynamo_orig_callable"  # where torch.compile(function) keeps the function


class _WithoutHistory(TorchFunctionMode):
    """Copies values of tensors that came out of others, where torch refuses: weights under old norms, kept features."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def copy_of(network: Any, memo: dict[int, Any] | None = None) -> Any:
    """A deep copy of a network or of what belongs to one; what has a gradient history is copied without it."""
    with _WithoutHistory():
        return copy.deepcopy(network, memo)


def borrowing(network: nn.Module) -> nn.Module:
    """A copy of the modules of a network, with the very same tensors of its state."""
    return copy_of(network, {id(tensor): tensor for tensor in network.state_dict(keep_vars=True).values()})


def uncompiled(network: nn.Module) -> nn.Module:
    """The same network without `torch.compile`: itself, what was compiled, or a copy with the very same tensors."""
    while _WRAPPED in network._modules:
        network = network.get_submodule(_WRAPPED)
    if not any(True for _ in _compiled(network)):
        return network
    memo: dict[int, Any] = _tensors(network)
    for module in reversed(list(network.modules())):
        if _WRAPPED in module._modules:
            memo[id(module)] = copy_of(module.get_submodule(_WRAPPED), memo)
    plain = copy_of(network, memo)  # torch leaves out of a copy what module.compile() did
    for module in plain.modules():
        for name, function in list(vars(module).items()):
            if hasattr(function, _COMPILED):
                _put_back(module, name, getattr(function, _COMPILED), memo)
    return plain


def _compiled(network: nn.Module) -> Iterator[nn.Module]:
    for module in network.modules():
        functions = any(hasattr(value, _COMPILED) for value in vars(module).values() if callable(value))
        if _WRAPPED in module._modules or module._compiled_call_impl is not None or functions:
            yield module


def _put_back(module: nn.Module, name: str, function: Any, memo: dict[int, Any]) -> None:
    """What was compiled takes the place of what torch made of it; a method of a copied module belongs to the copy."""
    while getattr(function, "__globals__", {}).get("__name__", "").startswith("torch._dynamo"):
        function = function.__wrapped__  # forwards of torch's own modules have two wrappers
    if getattr(type(module), name, None) is getattr(function, "__func__", function):
        delattr(module, name)
    elif isinstance(function, MethodType):
        setattr(module, name, MethodType(function.__func__, memo.get(id(function.__self__), function.__self__)))
    else:
        setattr(module, name, function)


def _tensors(network: nn.Module) -> dict[int, Any]:
    return {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}


def check_kind(network: nn.Module, whose: str) -> None:
    """Whether a network can be copied and followed at all.

    Args:
        network: of the caller.
        whose: how a message begins, such as "task 'a': ".

    Raises:
        InputError: wrapped for several devices, scripted, traced, exported, or without values; the message says what to
            give instead.
    """
    for path, module in network.named_modules():
        what = f"module {path!r}" if path else "the network"
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise InputError(
                f"{whose}{what} is wrapped in {type(module).__name__}: give the network inside, `model.module`."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{whose}{what} is a program of torch.jit (scripted or traced): give the module that it was made from."
            )
        if any(base.__module__.startswith("torch.export") for base in type(module).__mro__):
            raise InputError(f"{whose}{what} is a program of torch.export: give the module from which it was exported.")
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_meta:
            raise InputError(
                f"{whose}{name!r} is on the meta device and has no values: give the network its weights first, with "
                f"model.to_empty(device=...) and load_state_dict(...)."
            )
