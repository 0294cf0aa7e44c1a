"""What others do: average the weights of units that answer alike (Git Re-Basin, ZipIt!), all hidden layers shared.

For two networks of one architecture. Units are matched by the correlation of their answers to the same images, or not
at all; then the weights of all layers but the output layers are averaged. Re-solving the output layers by least
squares is a strong addition that costs next to nothing.

S. K. Ainsworth, J. Hayase, S. Srinivasa, *Git Re-Basin*, 2022 (activation matching); G. Stoica et al., *ZipIt!*, 2023.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import taskzip as tz
from taskzip.algebra import LayerStatistics, least_squares
from taskzip.graph import OUTPUT, Layer, Structure, analyse
from taskzip.tasks import call
from taskzip.zipped import History

MATCHED = 500
"""Images of each task whose answers are correlated; a convolution answers at many places of each."""


def averaged(tasks: Sequence[tz.Task], *, matched: bool, resolved: bool = False) -> tz.ZippedModel:
    """Two networks with one set of hidden weights, the mean of theirs.

    Args:
        tasks: their batches are `(inputs, targets)` of one shape.
        matched: pair units by correlation; otherwise unit k with unit k.
        resolved: solve the output layers again, to give the original networks' answers.
    """
    networks = [copy.deepcopy(task.model).eval() for task in tasks]
    images = [torch.cat([x for x, _ in task.batches()]) for task in tasks]
    structure = analyse(networks[0], images[0][:2], call)
    if matched:
        _match(networks, structure, torch.cat([x[:MATCHED] for x in images]))
    output = next(layer for layer in structure.layers if layer.pinned == OUTPUT)
    tied_average(networks, {output.weight, output.bias or ""})
    if resolved:
        for task, network, x in zip(tasks, networks, images, strict=True):
            _resolve(network, task.model, output, x)
    named = {task.name: network for task, network in zip(tasks, networks, strict=True)}
    return tz.ZippedModel(named, History({"balance": [1 / len(named)] * len(named)})).eval()


def tied_average(networks: Sequence[nn.Module], private: set[str]) -> None:
    """Give networks of one architecture one set of parameters, their means, but for those of these names."""
    others = networks[1:]
    parameters = [dict(network.named_parameters()) for network in networks]
    for name in parameters[0].keys() - private:
        with torch.no_grad():
            parameters[0][name].copy_(torch.stack([each[name] for each in parameters]).mean(0))
        path, _, attribute = name.rpartition(".")
        for network in others:
            setattr(network.get_submodule(path), attribute, parameters[0][name])


def _match(networks: Sequence[nn.Module], structure: Structure, images: Tensor) -> None:
    """Put the units of the second network into the order in which they correlate most with those of the first."""
    one, other = (_answers(network, structure, images) for network in networks)
    for space in range(len(structure.spaces)):
        layer = next(layer for layer in structure.layers if layer.spaces == (space,))
        correlation = one[layer.name].mT @ other[layer.name]
        _, order = linear_sum_assignment(-correlation.numpy())
        structure.reorder(networks[1], space, np.asarray(order))


@torch.no_grad()
def _answers(network: nn.Module, structure: Structure, images: Tensor) -> dict[str, Tensor]:
    """What the units of each layer answer, standardised, [images * positions, units]."""
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in structure.layers}
    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, y, kept=kept: kept.append(y.relu().movedim(1, -1).flatten(0, -2))
        )
        for name, kept in found.items()
    ]
    for x in images.split(500):
        network(x)
    for hook in hooks:
        hook.remove()
    return {name: _standardised(torch.cat(kept)) for name, kept in found.items()}


def _standardised(answers: Tensor) -> Tensor:
    answers = answers - answers.mean(0)
    return answers / answers.norm(dim=0).clamp_min(torch.finfo(answers.dtype).tiny)


@torch.no_grad()
def _resolve(network: nn.Module, original: nn.Module, layer: Layer, images: Tensor) -> None:
    """Solve an output layer by least squares, from what it reads now to what the original network answers."""
    read: list[Tensor] = []
    module = network.get_submodule(layer.name)
    assert isinstance(module, nn.Linear)
    hook = module.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
    statistics = LayerStatistics(layer.inputs, layer.units, images.device)
    for x in images.split(500):
        network(x)
        statistics.update(read.pop(), original(x))
    hook.remove()
    present = torch.cat([module.weight, module.bias[:, None]], dim=1).double()
    solved = least_squares(statistics, present, 1e-3, bias=True)
    module.weight.copy_(solved[:, :-1])
    module.bias.copy_(solved[:, -1])
