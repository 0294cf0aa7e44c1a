"""Tasks on one input, with what they have in common computed once."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.utils import _pytree as pytree

from taskzip.errors import InputError
from taskzip.zipped.inventory import Inventory
from taskzip.zipped.memo import Memo


class _WrittenInto(Exception):
    """A network wrote into a result that another one has too."""


def run_jointly(networks: nn.ModuleDict, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
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
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or peek_interpreter_stack() is not None:
        return _run_apart(networks, args, kwargs)
    inventory = _inventory(networks)
    inputs = _tensors((args, kwargs))
    if inventory.runs_apart() or any(tensor.is_meta for tensor in inputs):
        return _run_apart(networks, args, kwargs)
    grad = torch.is_grad_enabled()
    # Inference mode does not count how often a tensor was written to, which the memo has to know.
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        if any(tensor.is_inference() for tensor in inputs):
            args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, (args, kwargs))
            inputs = _tensors((args, kwargs))
        versions = [tensor._version for tensor in inputs]
        common = [*([tensor] for tensor in (*inputs, *inventory.weights)), *inventory.equal_buffers()]
        memo = Memo(common, inventory.apart)
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


def _run_apart(networks: nn.ModuleDict, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: network(*args, **kwargs) for name, network in networks.items()}


_inventories: WeakKeyDictionary[nn.ModuleDict, Inventory] = WeakKeyDictionary()


def _inventory(networks: nn.ModuleDict) -> Inventory:
    found, present = _inventories.get(networks), list(networks.values())
    if found is None or not found.holds(present):
        found = _inventories[networks] = Inventory(present)
    return found


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
