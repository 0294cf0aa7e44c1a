"""Tasks on one input, or on one each, with what they have in common computed once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.utils import _pytree as pytree

from taskzip.tasks import Call
from taskzip.zipped.inventory import Inventory
from taskzip.zipped.memo import Memo


class _WrittenInto(Exception):
    """A network wrote into a result that another one has too."""


def run_jointly(networks: nn.ModuleDict, calls: Mapping[str, Call]) -> dict[str, Any]:
    """Every network's output, the same as if each had run by itself, on a copy of its input.

    What they have in common is computed once: results of pure functions of the input, of shared weights and of equal
    buffers, and of layers that compute shared units by themselves, where these read equal values (without gradients,
    and to rounding). Results, and what such layers read, stay in memory until the last network has taken them.

    Each network does run by itself where any is in training mode, for dropout and batch statistics are its own; where
    any holds torch's own attention or compiled parts; where no two read the same tensor; and while torch compiles,
    traces or exports.

    Args:
        networks: by task.
        calls: the arguments of each; one tensor may be read by several.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or peek_interpreter_stack() is not None:
        return _run_apart(networks, calls)
    inventory = _inventory(networks)
    read = {name: {id(tensor): tensor for tensor in _tensors(call)} for name, call in calls.items()}
    alike = not read or any(sum(key in each for each in read.values()) > 1 for key in set().union(*read.values()))
    if inventory.runs_apart() or not alike or any(t.is_meta for each in read.values() for t in each.values()):
        return _run_apart(networks, calls)
    grad = torch.is_grad_enabled()
    # Inference mode does not count how often a tensor was written to, which the memo has to know.
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        copies = {name: {key: tensor.clone() for key, tensor in each.items()} for name, each in read.items()}
        inputs = [[each[key] for each in copies.values() if key in each] for key in set().union(*read.values())]
        common = [*inputs, *([tensor] for tensor in inventory.weights), *inventory.equal_buffers()]
        memo = Memo(common, inventory.apart)
        outputs = {}
        try:
            for left, (name, network) in zip(reversed(range(len(networks))), networks.items(), strict=True):
                memo.last = left == 0
                outputs[name] = _run(network, memo, *_with(calls[name], copies[name]))
        except _WrittenInto:
            return _run_apart(networks, calls)
        return outputs


def _run_apart(networks: nn.ModuleDict, calls: Mapping[str, Call]) -> dict[str, Any]:
    outputs = {}
    for name, network in networks.items():
        args, kwargs = _with(calls[name], {id(tensor): tensor.clone() for tensor in _tensors(calls[name])})
        outputs[name] = network(*args, **kwargs)
    return outputs


def _with(call: Call, copies: Mapping[int, Tensor]) -> Call:
    """The arguments with copies in place of the tensors, which a network may write into."""
    return pytree.tree_map_only(Tensor, lambda tensor: copies[id(tensor)], call)


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
