"""Multi-Task Zipping, Algorithm 1 of the paper: layer by layer, pair units, share their weights, correct the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from taskzip.alignment import JointInputs, align_inputs
from taskzip.assembly import Groups, install_blocks
from taskzip.curvature import LayerStatistics
from taskzip.errors import InputError
from taskzip.graph import OUTPUT, Layer
from taskzip.joining import JointLayer
from taskzip.matching import Matching
from taskzip.members import Member, Owners
from taskzip.observation import MaxRows
from taskzip.plan import Quota, SharePlan
from taskzip.randomness import seeded
from taskzip.recalibration import batch_norm_statistics, least_squares
from taskzip.retraining import Retraining
from taskzip.settings import Settings, read_settings
from taskzip.task import Task
from taskzip.zipped import LayerRecord, ZippedModel


def zip_tasks(
    tasks: Sequence[Task],
    *,
    share: float | Mapping[str, float] | SharePlan,
    balance: float | Sequence[float] | Mapping[str, float] | None = None,
    matching: Matching = "optimal",
    compensate: bool = True,
    damping: float = 1e-2,
    ridge: float = 1e-3,
    max_rows: MaxRows = "auto",
    retrain: int | Mapping[str, int] | Retraining | None = None,
    progress: bool = True,
    seed: int = 0,
) -> ZippedModel:
    """Merge trained networks into one that does every task (Algorithm 1 of the paper), without labels or training.

    Layer by layer, units of the two networks that do the same job are paired, share one set of incoming weights, and
    these are corrected so that both tasks lose as little as possible. The output layers stay private. The given models
    are left exactly as they were.

    Args:
        tasks: two or more tasks, with networks of equally many layers; widths may differ. They are added one after
            another to the joint network (Sec. 3.4); a unit of a later task may join units that others share already.
        share: how much to share: a fraction of each hidden layer's units (of the smaller one), a dict by layer name
            with fractions (float) or counts (int), or `Threshold(eps)`. Layers are called as in the first task's
            network.
        balance: the weight of each task's error (alpha): a dict by task name or a sequence, summing to 1; a single
            number is the first task's. Default: equal.
        matching: "optimal" (exact minimum-cost pairs), "greedy" (the paper's) or "random".
        compensate: re-solve each task's weights from the changed inputs by least squares before merging, and bring
            merged units back to their original spread (design 2.5). The paper's own procedure is `matching="greedy",
            compensate=False`.
        damping: added to each curvature, relative to the mean of its diagonal.
        ridge: strength with which compensation holds on to the present weights, relative to the inputs' mean square.
        max_rows: how many rows (samples times output positions) a layer's curvature is summed over: a number, "auto"
            (50 per column), or None for all.
        retrain: steps of light retraining after each layer that shares anything (line 10 of Algorithm 1): a number, a
            dict by layer name, or `Retraining` for more settings. Default: none.
        progress: show a progress bar on standard error.
        seed: for sampled rows, random matching and retraining.

    Returns:
        The joint network, in eval mode.

    Raises:
        InputError: tasks, data or settings that cannot be used; the message names task, layer and shapes.
        GraphError: a network that torch.export cannot follow, or that was read wrongly.
    """
    tasks = _checked(tasks)
    settings = read_settings(
        [task.name for task in tasks],
        share=share,
        balance=balance,
        matching=matching,
        compensate=compensate,
        damping=damping,
        ridge=ridge,
        max_rows=max_rows,
        retrain=retrain,
        seed=seed,
    )
    with seeded(settings.seed):
        return _zip(tasks, settings, progress)


def _zip(tasks: Sequence[Task], settings: Settings, progress: bool) -> ZippedModel:
    """Algorithm 1: layer by layer, each from inputs computed by the networks as zipped so far."""
    members = [Member(task, settings.seed) for task in tasks]
    layers = _correspondence(members)
    _check_names("share", settings.plan.named(), layers)
    _check_names("retrain", settings.retraining.named(), layers)
    settings.retraining.check(tasks)
    zipped = ZippedModel({member.task.name: member.network for member in members})
    zipped.history.settings = settings.as_dict() | {"samples": {m.task.name: m.samples for m in members}}
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        todo = bar.add_task("zipping", total=len(layers))
        for layer in layers:
            bar.update(todo, description=f"zipping {layer[0].name}")
            record = _zip_layer(members, layer, settings)
            zipped.history.layers.append(record)
            if record.shared and (steps := settings.retraining.after(record.name)):
                settings.retraining.run(zipped, tasks, steps, seed=settings.seed)
            bar.advance(todo)
    return zipped.eval()


def _zip_layer(members: Sequence[Member], layers: Sequence[Layer], settings: Settings) -> LayerRecord:
    """One turn of Algorithm 1: what the layer reads, which units pair, their merged weights, the joint layer."""
    name = layers[0].name
    inputs, obstacle = _participants(members, layers)
    quota = settings.plan.quota(name, min(layer.units for layer in layers))
    if obstacle and quota.pairs and name in settings.plan.named():
        raise InputError(f"layer {name!r} cannot be shared ({obstacle}): leave it out of `share`.")
    before = _size(members, layers)
    sharing = inputs.layers if quota.pairs and not obstacle else {}

    statistics = [_observe(m, x, settings, t in sharing) for t, (m, x) in enumerate(zip(members, layers, strict=True))]
    weights = [_compensated(m, x, s, settings) for m, x, s in zip(members, layers, statistics, strict=True)]
    joint = _join(members, inputs, statistics, weights, quota, settings) if sharing else None
    merged = dict(enumerate(weights)) | (joint.finished({t: weights[t] for t in sharing}) if joint else {})
    for t, (member, layer) in enumerate(zip(members, layers, strict=True)):
        _settle(member, layer, statistics[t], merged[t])
    if joint is None or not joint.shared_units():
        note = "" if all(layer.pinned == OUTPUT for layer in layers) else obstacle
        return _record(members, layers, 0, 0.0, before, note)
    groups = {t: _arrange(members[t], layer, name, joint.units_of(t)) for t, layer in sharing.items()}
    install_blocks(members, inputs, groups)
    return _record(members, layers, joint.shared_units(), joint.cost, before, "")


def _participants(members: Sequence[Member], layers: Sequence[Layer]) -> tuple[JointInputs, str]:
    """The tasks whose layers can share with the first one's and the inputs they share; or why there are none."""
    obstacle = ""
    able: dict[int, Layer] = {}
    for t, (member, layer) in enumerate(zip(members, layers, strict=True)):
        first = next(iter(able.values()), layer)
        if layer.pinned:
            obstacle = obstacle or f"{member.task.name}: {layer.pinned}"
        elif (layer.kind, layer.kernel) != (first.kind, first.kernel):
            obstacle = obstacle or f"a {first.form} and a {layer.form} have no weights in common"
        else:
            able[t] = layer
    inputs = align_inputs(members, able)
    if len(able) > 1 and not inputs.segments:
        obstacle = "no inputs in common (what it reads is not shared, or differs in size)"
    return inputs, obstacle if len(able) < 2 or not inputs.segments else ""


def _join(
    members: Sequence[Member],
    inputs: JointInputs,
    statistics: Sequence[LayerStatistics | None],
    weights: Sequence[Tensor],
    quota: Quota,
    settings: Settings,
) -> JointLayer:
    """Lines 4 to 9 of Algorithm 1, one task after another."""
    seen = {t: s for t, s in enumerate(statistics) if s is not None}
    own = {t: weights[t] for t in inputs.layers}
    joint = JointLayer(members, inputs, seen, own, settings.balance, settings.damping)
    for task in list(inputs.layers)[1:]:
        joint.add(task, quota, settings.matching, settings.seed)
    if settings.compensate:
        joint.match_spread()
    return joint


def _arrange(member: Member, layer: Layer, writer: str, units: Mapping[Owners, Tensor]) -> Groups:
    """Put a task's units into the order of the joint layer: those of most owners first, its own last."""
    ordered = sorted(units.items(), key=lambda group: (-len(group[0]), group[0]))
    groups = [(owners, len(each)) for owners, each in ordered]
    member.share(
        layer, writer, torch.cat([each for _, each in ordered]).cpu().numpy(), [g for g in groups if len(g[0]) > 1]
    )
    return groups


def _observe(member: Member, layer: Layer, settings: Settings, sharing: bool) -> LayerStatistics | None:
    """Lines 2 and 3 of Algorithm 1, where anything is to be done with it."""
    if not sharing and not _to_solve(member, layer, settings):
        return None
    # What the original network answers serves compensation and batch-norm only; else one forward pass is enough.
    changed = member.changed and not layer.reads_input and bool(settings.compensate or layer.batch_norm)
    return member.observer(settings.max_rows, settings.seed).observe(layer, changed=changed)


def _to_solve(member: Member, layer: Layer, settings: Settings) -> bool:
    """Whether compensation has anything to do: the layer's inputs may have changed."""
    return settings.compensate and member.changed and layer.solvable and not layer.reads_input


def _compensated(member: Member, layer: Layer, statistics: LayerStatistics | None, settings: Settings) -> Tensor:
    weights = member.weights(layer)
    if statistics is None or not _to_solve(member, layer, settings):
        return weights
    return least_squares(statistics, weights, settings.ridge, bias=layer.bias is not None)


def _settle(member: Member, layer: Layer, statistics: LayerStatistics | None, weights: Tensor) -> None:
    """Write a layer's new weights into the network, and let the batch-norm behind it follow."""
    if statistics is None:
        return
    member.set_weights(layer, weights)
    if layer.batch_norm:
        mean, variance = member.batch_norm(layer)
        m, v = batch_norm_statistics(statistics, weights, mean.double(), variance.double(), layer.batch_norm.eps)
        mean.copy_(m)
        variance.copy_(v)


def _size(members: Sequence[Member], layers: Sequence[Layer]) -> int:
    """Parameters of a layer in all networks, shared ones counted once."""
    parameters = {p for m, x in zip(members, layers, strict=True) for p in m.parameters(x)}
    return sum(p.numel() for p in parameters)


def _record(
    members: Sequence[Member], layers: Sequence[Layer], shared: int, cost: float, before: int, note: str
) -> LayerRecord:
    names, units = tuple(layer.name for layer in layers), tuple(layer.units for layer in layers)
    return LayerRecord(names[0], names, units, shared, cost, before, _size(members, layers), note)


def _checked(tasks: Sequence[Task]) -> Sequence[Task]:
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not all(isinstance(t, Task) for t in tasks):
        raise InputError("tasks must be a list of taskzip.Task objects.")
    if len(tasks) < 2:
        raise InputError(f"zip needs at least two tasks, got {len(tasks)}.")
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two tasks are called {twice!r}: give each its own name.")
    for what, of in (("dtype", lambda p: p.dtype), ("device", lambda p: p.device)):
        found = [{of(p) for p in task.model.parameters() if p.is_floating_point()} for task in tasks]
        if any(each != found[0] for each in found) or len(found[0]) != 1:
            listed = "; ".join(
                f"{n!r} has {', '.join(sorted(map(str, f))) or 'no parameters'}"
                for n, f in zip(names, found, strict=True)
            )
            raise InputError(f"all parameters must have one {what}: {listed}. Convert the models with .to(...) first.")
    return tasks


def _correspondence(members: Sequence[Member]) -> list[tuple[Layer, ...]]:
    """Which layers belong together: the first with the first, and so on."""
    layers = [member.structure.layers for member in members]
    if len({len(each) for each in layers}) > 1:
        listed = "; ".join(
            f"{m.task.name!r} has {len(each)} ({', '.join(layer.name for layer in each)})"
            for m, each in zip(members, layers, strict=True)
        )
        raise InputError(
            f"the networks differ in depth: {listed}. zip needs equally many linear and convolution layers."
        )
    if not layers[0]:
        raise InputError("the networks have no linear or convolution layers: there is nothing to zip.")
    return list(zip(*layers, strict=True))


def _check_names(argument: str, named: Iterable[str], layers: Sequence[tuple[Layer, ...]]) -> None:
    known = [layer[0].name for layer in layers]
    for name in named:
        if name not in known:
            raise InputError(f"{argument} names layer {name!r}; the first network's layers are {', '.join(known)}.")
