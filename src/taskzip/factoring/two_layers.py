"""A layer of low rank as two layers of torch's own, one behind the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from taskzip.algebra import LowRank
from taskzip.copying import copy_of
from taskzip.errors import InputError
from taskzip.graph import Layer
from taskzip.tasks import Batch, Task, evaluating, has_numbers, run_batch, same_outputs, tensors

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def replaceable(task: Task, network: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """The layers that two can stand for: modules of torch's own of which nothing but the call is used."""
    names = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
    able = [
        layer
        for layer in layers
        if names[id(network.get_parameter(layer.weight))] == 1 and _is_torch_own(network, layer.weight, layer.bias)
    ]
    batch = next(task.batches())
    with evaluating(network):
        wanted = run_batch(task, network, batch, 0)
    same = partial(_same_answers, task, network, batch, wanted)
    return able if same(able) else [layer for layer in able if same([layer])]


def _is_torch_own(network: nn.Module, weight: str, bias: str | None) -> bool:
    path, _, name = weight.rpartition(".")
    if name != "weight" or not path or bias not in (None, f"{path}.bias"):
        return False
    module = network.get_submodule(path)
    return type(module) in _KINDS and not network.get_parameter(weight).is_complex() and not _hooks(module)


def _hooks(module: nn.Module) -> bool:
    """Whether something is called along with the module."""
    return any(getattr(module, f"_{when}_hooks") for when in ("forward", "forward_pre", "backward", "backward_pre"))


def _same_answers(task: Task, network: nn.Module, batch: Batch, wanted: Any, layers: Sequence[Layer]) -> bool:
    """Whether a network answers the same with two layers for each of these: its code may look at what they are."""
    trial = copy_of(network)
    for layer in layers:
        weight = network.get_parameter(layer.weight).detach().flatten(1)
        units, inputs = weight.shape
        left, right = (torch.eye(units), weight) if units <= inputs else (weight, torch.eye(inputs))
        bias = torch.zeros(units) if layer.bias is None else network.get_parameter(layer.bias).detach()
        put_two(trial, layer, LowRank(left, right, bias))
    try:
        with evaluating(trial):
            given = run_batch(task, trial, batch, 0)
    except (AttributeError, InputError):
        return False
    return same_outputs(*([y for y in tensors(output) if has_numbers(y)] for output in (wanted, given)))


def put_two(network: nn.Module, layer: Layer, factors: LowRank) -> None:
    """Put two layers into the place of one: from its inputs to the rank, and from there to its units."""
    path = layer.weight.rpartition(".")[0]
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, _two(network.get_submodule(path), factors))


def _two(module: Any, factors: LowRank) -> nn.Sequential:
    rank, bias = len(factors.right), module.bias is not None
    if isinstance(module, nn.Linear):
        first, second = nn.Linear(module.in_features, rank, bias=False), nn.Linear(rank, module.out_features, bias)
    else:
        kind: Any = type(module)
        slides = (module.kernel_size, module.stride, module.padding, module.dilation)
        first = kind(module.in_channels, rank, *slides, bias=False, padding_mode=module.padding_mode)
        second = kind(rank, module.out_channels, 1, bias=bias)
    pair = nn.Sequential(first, second).to(module.weight)
    _fill(first, factors.right)
    _fill(second, factors.left, factors.bias if bias else None)
    pair.train(module.training)
    for parameter in pair.parameters():
        parameter.requires_grad_(module.weight.requires_grad)
    return pair


@torch.no_grad()
def _fill(module: Any, weight: Tensor, bias: Tensor | None = None) -> None:
    module.weight.copy_(weight.reshape(module.weight.shape))
    if bias is not None:
        module.bias.copy_(bias)
