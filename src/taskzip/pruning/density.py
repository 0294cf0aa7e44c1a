"""How many weights each layer of a pruned network keeps, and what its weights cost."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

from taskzip.algebra import LayerStatistics, damped, removal_costs, restricted
from taskzip.errors import InputError
from taskzip.graph import Layer
from taskzip.zipping import Member, Settings, survey

log = logging.getLogger("taskzip")

_LEAST_DAMPING = 1e-4
"""Keeps curvatures positive definite that were summed up in float32, however little damping is wanted."""

_DEEPER = 0.3
"""How far below the mean density the costs of a layer are followed when layers are compared."""

_CONSTANT = 1e-6
"""A spread below this part of the answers' squares is rounding, and what is constant is left to the bias."""


def check_fractions(keep: float | Mapping[str, float]) -> None:
    """Whether `keep` can be used.

    Raises:
        InputError: what is not a fraction above 0, up to 1.
    """
    by_layer = keep if isinstance(keep, Mapping) else {None: keep}
    for layer, part in by_layer.items():
        where = "all layers" if layer is None else f"layer {layer!r}"
        if not isinstance(part, Real) or isinstance(part, bool) or not 0 < part <= 1:
            raise InputError(f"keep for {where} is {part!r}: give a fraction above 0, up to 1, or a dict of these.")


def kept_counts(member: Member, keep: float | Mapping[str, float], settings: Settings) -> dict[str, int]:
    """How many weights each layer keeps; those of other layers are not touched.

    Raises:
        InputError: layers that do not exist or cannot be pruned, or too small a fraction.
    """
    layers = {layer.name: layer for layer in member.structure.layers}
    if not isinstance(keep, Mapping):
        return _divided(member, float(keep), settings)
    for name in keep:
        if name not in layers:
            raise InputError(
                f"task {member.task.name!r}: keep names layer {name!r}; its layers are {', '.join(layers)}."
            )
        if not layers[name].solvable:
            raise InputError(
                f"task {member.task.name!r}: layer {name!r} cannot be pruned ({_obstacle(layers[name])}): leave it out "
                f"of `keep`."
            )
    return {name: max(1, round(part * size(layers[name]))) for name, part in keep.items()}


def _divided(member: Member, keep: float, settings: Settings) -> dict[str, int]:
    """One fraction for all: the weights that are dearest for their layer, errors being relative to its answers."""
    layers = [layer for layer in member.structure.layers if layer.solvable]
    whole = [layer for layer in member.structure.layers if not layer.solvable]
    listed = ", ".join(f"{layer.name} ({_obstacle(layer)})" for layer in whole)
    if whole:
        log.warning("task %r: left whole: %s", member.task.name, listed)
    total, fixed = sum(map(size, member.structure.layers)), sum(map(size, whole))
    count = round(keep * total) - fixed
    if count < len(layers):
        raise InputError(
            f"task {member.task.name!r}: keep={keep} leaves too little: one weight of each layer and all of those that "
            f"cannot be pruned ({listed or 'none'}) are {(fixed + len(layers)) / total:.2g} of the weights."
        )
    if count == total - fixed:
        return {layer.name: size(layer) for layer in layers}
    seen = survey(member, settings, {layer.name for layer in layers})
    costs = [_relative_costs(member, layer, seen[layer.name], keep, settings).flatten() for layer in layers]
    owners = torch.cat([torch.full_like(each, k, dtype=torch.int64) for k, each in enumerate(costs)])
    shares = owners[torch.cat(costs).topk(count).indices].bincount(minlength=len(layers))
    return {layer.name: share for layer, share in zip(layers, shares.tolist(), strict=True)}


def _relative_costs(
    member: Member, layer: Layer, statistics: LayerStatistics, keep: float, settings: Settings
) -> Tensor:
    """What each weight of the original network costs, relative to the variance of the layer's answers."""
    weights = member.weights(layer)
    mean, variance = statistics.moments(_normed(member, layer, weights))
    scale = float(variance.sum() + _CONSTANT * mean.square().sum()) * statistics.rows
    costs = layer_costs(member, layer, statistics, weights, round(_DEEPER * keep * size(layer)), settings)
    costs = costs / scale if scale else costs.clamp_max(0)
    costs.view(-1)[costs.argmax()] = torch.inf  # no layer vanishes
    return costs


def layer_costs(
    member: Member, layer: Layer, statistics: LayerStatistics, weights: Tensor, kept: int, settings: Settings
) -> Tensor:
    """What it costs to remove each of these weights of a layer, [units, inputs * taps], see `removal_costs`."""
    d = weights.shape[1] - (layer.bias is None)
    h = restricted(damped(statistics.curvature, max(settings.damping, _LEAST_DAMPING)), slice(0, d))
    return removal_costs(h, _normed(member, layer, weights)[:, :d], kept, free=weights.shape[1] - 1)


def _normed(member: Member, layer: Layer, weights: Tensor) -> Tensor:
    """A batch-norm behind a layer makes the scale of its units meaningless."""
    return weights / member.batch_norm_scale(layer)[:, None] if layer.batch_norm else weights


def _obstacle(layer: Layer) -> str:
    return layer.pinned or "its units do not read all inputs"


def size(layer: Layer) -> int:
    """How many weights a layer has."""
    return layer.units * layer.inputs * layer.taps
