"""Pruning by layer-wise optimal brain surgeon (L-OBS), from the same curvature as zipping."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from taskzip.algebra import least_squares
from taskzip.copying import check_kind
from taskzip.errors import InputError
from taskzip.graph import Layer
from taskzip.observing import MaxRows
from taskzip.pruning.density import check_fractions, kept_counts, layer_costs, size
from taskzip.randomness import seeded
from taskzip.tasks import Task
from taskzip.training import Retraining
from taskzip.zipped import History, ZippedModel
from taskzip.zipping import Member, Settings, compensated, observe, settings_alone, settle

log = logging.getLogger("taskzip")
"""Says at level INFO what became of each layer, and warns of those that stay whole."""


def prune(
    task: Task,
    *,
    keep: float | Mapping[str, float],
    retrain: int | Retraining | None = None,
    damping: float = 1e-2,
    ridge: float = 1e-3,
    max_rows: MaxRows = "auto",
    progress: bool = True,
    seed: int = 0,
) -> nn.Module:
    """Remove weights of a trained network by layer-wise optimal brain surgeon, without labels or training.

    Layer by layer, from the inputs as pruning so far has left them: the weights go whose removal raises the error
    against the original network's pre-activations least, w^2 / (2 [H^-1]_qq) with H = sum x x^T, in rounds (`surgeon`);
    those that stay are solved again by least squares, which is the paper's update for all removed weights at once
    (Dong, Chen, Pan, 2017, arXiv:1705.07565, Sec. 3). The given network is left exactly as it was. What was 0 stays 0,
    biases stay, and `zip` keeps the zeros where these are more than 5% of the weights. Running statistics of a
    batch-norm that directly follows a layer follow its new weights.

    Args:
        task: the network, its calibration data, and the loss if labels are to retrain it.
        keep: the fraction (above 0, to 1) of weights to keep: one number for the weights of all layers together,
            which are divided among the layers by the rise of the layers' errors relative to the variance of their
            pre-activations; or a dict by layer name. Layers that the dict leaves out keep their weights as they are;
            those with 1.0 keep all, but are solved again. Layers whose units do not read all inputs (grouped and
            depthwise convolutions), or whose weights have other readers, always stay whole: with one number a warning
            names them, and they count.
        retrain: steps of light retraining that keeps the zeros, with labels and a relative step of 0.01, or
            `Retraining` for more settings, such as `loss="distill"`. Default: none.
        damping: added to the curvature for the choice of weights, relative to the mean of its diagonal;
            at least 1e-4.
        ridge: strength with which solving again holds on to the present weights, relative to the inputs' mean square.
        max_rows: how many rows (samples times output positions) a layer's curvature is summed over: a number, "auto"
            (50 per column), or None for all.
        progress: show a progress bar on standard error.
        seed: for sampled rows and retraining.

    Returns:
        The pruned network: the same class and state_dict keys, units in the same order, in eval mode.

    Raises:
        InputError: task, data or settings that cannot be used; the message names task and layer.
        GraphError: a network that torch.export cannot follow.
    """
    if not isinstance(task, Task):
        raise InputError(f"prune takes a taskzip.Task, got {type(task).__name__}.")
    check_kind(task.model, f"task {task.name!r}: ")
    settings = settings_alone(damping=damping, ridge=ridge, max_rows=max_rows, retrain=retrain, seed=seed)
    if isinstance(settings.retraining.steps, Mapping):
        raise InputError("prune retrains once, at the end: give `retrain` a number of steps, not a dict by layer.")
    check_fractions(keep)
    with seeded(settings.seed):
        member = Member(task, settings.seed)
        member.pruned = {layer.name for layer in member.structure.layers}
        settings.retraining.check([task])
        with closing(member.forwards):
            _prune(member, kept_counts(member, keep, settings), settings, progress)
        return _retrained(member, settings, progress)


def _prune(member: Member, counts: Mapping[str, int], settings: Settings, progress: bool) -> None:
    """Layer by layer in the order in which they run, so that each makes up for those before it."""
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        todo = bar.add_task("pruning", total=len(member.structure.layers))
        for layer in member.structure.layers:
            bar.update(todo, description=f"pruning {layer.name}")
            if layer.name in counts:
                _prune_layer(member, layer, counts[layer.name], settings)
            else:
                settle(member, layer, None, member.weights(layer), settings)
            bar.advance(todo)


def _prune_layer(member: Member, layer: Layer, count: int, settings: Settings) -> None:
    connections = int(member.weights(layer)[:, :-1].count_nonzero())
    if count >= connections and not member.changed:
        return
    statistics = observe(member, layer, settings, sharing=True)
    assert statistics is not None
    weights = compensated(member, layer, statistics, settings)
    if count < connections:
        costs = layer_costs(member, layer, statistics, weights, count, settings).flatten()
        kept = torch.zeros_like(costs).index_fill(0, costs.topk(count).indices, 1)
        weights[:, :-1] *= kept.view(len(weights), -1)
        assert settings.ridge is not None
        weights = least_squares(statistics, weights, settings.ridge, bias=layer.bias is not None)
        member.changed = True
    settle(member, layer, statistics, weights, settings)
    log.info("%s: %d of %d weights kept", layer.name, min(count, connections), size(layer))


def _retrained(member: Member, settings: Settings, progress: bool) -> nn.Module:
    retraining, steps = settings.retraining, settings.retraining.after("")
    if steps:
        network = ZippedModel({member.task.name: member.network}, History(settings.as_dict()))
        weights = member.pruned_weights()
        retraining.run(network, [member.task], steps, seed=settings.seed, weights=weights, progress=progress)
    return member.network.eval()
