"""What is done with one layer of one task: lines 2 to 4 of Algorithm 1, compensation, and what follows new weights."""

from __future__ import annotations

import logging
from collections.abc import Collection

from torch import Tensor

from taskzip.algebra import (
    LayerStatistics,
    batch_norm_statistics,
    check_reading,
    checked_batch_norm,
    checked_fit,
    choose_ridge,
    least_squares,
)
from taskzip.graph import OUTPUT, Layer
from taskzip.zipping.members import Member
from taskzip.zipping.settings import Settings

log = logging.getLogger("taskzip")


def observe(member: Member, layer: Layer, settings: Settings, sharing: bool) -> LayerStatistics | None:
    """Lines 2 to 4 of Algorithm 1, where anything is to be done with it."""
    if not sharing and not _to_solve(member, layer, settings):
        return None
    follows = _follows(layer, settings)
    changed = member.changed and not layer.reads_input and follows
    if follows and not member.answers.started and (changed or not member.changed):
        survey(member, settings, ())
    observer, rows = member.compared(layer, settings.max_rows, settings.seed)
    original = changed or (not member.changed and observer.answers.know(layer.name))
    hold_out = settings.ridge is None and _to_solve(member, layer, settings)
    statistics = observer.observe(layer, original=original, rows=rows, hold_out=hold_out)
    member.answers.forget(layer.name)
    if not changed and layer.solvable:
        check_reading(where(member, layer), statistics, member.weights(layer))
    return statistics


def survey(member: Member, settings: Settings, wanted: Collection[str]) -> dict[str, LayerStatistics]:
    """One pass over a task's data with the original network, for all layers."""
    layers = [
        layer
        for layer in member.structure.layers
        if layer.name in wanted or (layer.solvable and _follows(layer, settings)) or layer.batch_norm
    ]
    return member.observer(settings.max_rows, settings.seed).survey(layers, wanted)


def _follows(layer: Layer, settings: Settings) -> bool:
    """Whether anything needs what the original network answers; else one forward pass is enough."""
    return settings.spread or settings.own_scale or bool(layer.batch_norm) or _solves(layer, settings)


def _to_solve(member: Member, layer: Layer, settings: Settings) -> bool:
    """Whether compensation has anything to do: the layer's inputs may have changed."""
    return member.changed and not layer.reads_input and _solves(layer, settings)


def _solves(layer: Layer, settings: Settings) -> bool:
    """Whether compensation is for this layer."""
    return layer.solvable and (settings.compensate is True or (bool(settings.compensate) and layer.pinned == OUTPUT))


def compensated(member: Member, layer: Layer, statistics: LayerStatistics | None, settings: Settings) -> Tensor:
    """A layer's weights, solved again where its inputs may have changed (design 2.5)."""
    weights = member.weights(layer)
    if statistics is None or not _to_solve(member, layer, settings):
        return weights
    bias, pruned = layer.bias is not None, layer.name in member.pruned
    ridge = settings.ridge
    if ridge is None:
        ridge = choose_ridge(statistics, weights, bias=bias, pruned=pruned)
        statistics.parts = None
        log.debug("%s, %s: ridge %g", member.task.name, layer.name, ridge)
    solved = least_squares(statistics, weights, ridge, bias=bias, pruned=pruned)
    return checked_fit(where(member, layer), statistics, weights, solved)


def settle(
    member: Member, layer: Layer, statistics: LayerStatistics | None, weights: Tensor, settings: Settings
) -> None:
    """Write a layer's new weights into the network, and let the batch-norm behind it follow."""
    if statistics is not None:
        member.set_weights(layer, weights)
        old, new = statistics.answer_moments(), statistics.moments(weights)
    elif member.changed and layer.batch_norm and not layer.reads_input:
        observer, rows = member.compared(layer, settings.max_rows, settings.seed)
        before, now = observer.observe_outputs(layer, rows)
        old, new = before.answer_moments(), now.answer_moments()
    else:
        return
    if layer.batch_norm:
        mean, variance = member.batch_norm(layer)
        running, eps = (mean.double(), variance.double()), layer.batch_norm.eps
        found = batch_norm_statistics(old, new, *running, eps)
        m, v = checked_batch_norm(where(member, layer), old, new, running, found, eps)
        mean.copy_(m)
        variance.copy_(v)


def where(member: Member, layer: Layer) -> str:
    """Task and layer, for messages."""
    return f"task {member.task.name!r}, layer {layer.name!r}"
