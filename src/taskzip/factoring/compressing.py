"""One network of lower rank by itself: what one would do without merging, and what merging has to beat."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from taskzip.algebra import LayerStatistics, LowRank, low_rank, spectrum
from taskzip.copying import check_kind
from taskzip.errors import InputError
from taskzip.factoring.two_layers import put_two, replaceable
from taskzip.graph import Layer
from taskzip.observing import MaxRows, Sensitivity, sensitivities
from taskzip.planning import Ranked, choose_ranks
from taskzip.randomness import seeded
from taskzip.tasks import Task
from taskzip.zipping import Member, Settings, compensated, observe, settings_alone, settle, survey

log = logging.getLogger("taskzip")
"""Says at level INFO which rank each layer has got."""


def compress(task: Task, size: float, *, max_rows: MaxRows = "auto", progress: bool = True, seed: int = 0) -> nn.Module:
    """Give the layers of a trained network low rank, so that it has a part of its parameters; no labels, no training.

    Layer by layer, from the inputs as they have become: least squares for the original network's pre-activations, then
    the weights of the layer's rank that change the network's outputs least (`algebra.low_rank`). Ranks are divided over
    all layers by what the next parameter buys at the output, which one backward pass tells. A layer of low rank becomes
    two layers of torch's own, one behind the other: two linear ones, or a convolution with few channels and one of
    kernel size 1. The given network is left exactly as it was.

    Args:
        task: the network and its calibration data.
        size: the parameters to keep, as a fraction (above 0, below 1) of all that the network has.
        max_rows: how many rows (samples times output positions) a layer's sums are over: a number, "auto" (50 per
            column), or None for all.
        progress: show a progress bar on standard error.
        seed: for sampled rows.

    Returns:
        A network of the same class, in eval mode.

    Raises:
        InputError: a task or size that cannot be used; the message names the least possible size.
        GraphError: a network that torch.export cannot follow.
    """
    if not isinstance(task, Task):
        raise InputError(f"compress takes a taskzip.Task, got {type(task).__name__}.")
    if not isinstance(size, float) or not 0 < size < 1:
        raise InputError(f"size={size!r} must be a fraction above 0 and below 1 of the network's parameters.")
    check_kind(task.model, f"task {task.name!r}: ")
    settings = settings_alone(max_rows=max_rows, seed=seed)
    with seeded(seed):
        member = Member(task, seed)
        with closing(member.forwards):
            return _compressed(member, size, settings, progress)


def _compressed(member: Member, size: float, settings: Settings, progress: bool) -> nn.Module:
    layers = replaceable(member.task, member.network, [layer for layer in member.structure.layers if layer.solvable])
    metrics = sensitivities(member.task, member.network, layers, settings.seed)
    if not metrics:
        raise InputError(
            f"task {member.task.name!r}: no output has a gradient, by which errors of layers are weighed: let the "
            f"network give numbers, or pick them by Task(forward=...), without torch.no_grad."
        )
    layers = [layer for layer in layers if layer.name in metrics]
    ranks = _ranks(member, layers, metrics, size, settings)
    factors: dict[str, LowRank] = {}
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        todo = bar.add_task("compressing", total=len(member.structure.layers))
        for layer in member.structure.layers:
            bar.update(todo, description=f"compressing {layer.name}")
            rank = ranks.get(layer.name)
            statistics = observe(member, layer, settings, sharing=rank is not None)
            weights = compensated(member, layer, statistics, settings)
            if rank is not None:
                assert statistics is not None
                found = low_rank(statistics, weights, metrics[layer.name].metric, rank, bias=layer.bias is not None)
                factors[layer.name], weights = found, found.weights()
                member.changed = True
                log.info("%s: rank %d of %d", layer.name, rank, min(weights.shape))
            settle(member, layer, statistics, weights, settings)
            bar.advance(todo)
    for layer in layers:
        if layer.name in factors:
            put_two(member.network, layer, factors[layer.name])
    return member.network.eval()


def _ranks(
    member: Member, layers: list[Layer], metrics: Mapping[str, Sensitivity], size: float, settings: Settings
) -> dict[str, int | None]:
    """By layer name; None where a layer stays whole."""
    seen = survey(member, settings, [layer.name for layer in layers])
    total = sum(p.numel() for p in member.network.parameters())
    ranked = [_ranked(layer, member.weights(layer), seen[layer.name], metrics[layer.name]) for layer in layers]
    fixed = total - sum(each.whole for each in ranked)
    least = fixed + sum(each.least for each in ranked)
    if size * total < least:
        raise InputError(
            f"task {member.task.name!r}: size={size:g} cannot be reached: with rank 1 everywhere {least:,} of its "
            f"{total:,} parameters are left, {least / total:.3f} of them."
        )
    ranks = choose_ranks(ranked, int(size * total) - fixed)
    return {layer.name: rank for layer, rank in zip(layers, ranks, strict=True)}


def _ranked(layer: Layer, weights: Tensor, statistics: LayerStatistics, found: Sensitivity) -> Ranked:
    values = spectrum(statistics, weights, found.metric, bias=layer.bias is not None)
    left = torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)]) * found.rows
    inputs = layer.inputs * layer.taps
    return Ranked(left.cpu().numpy(), inputs + layer.units, inputs * layer.units)
