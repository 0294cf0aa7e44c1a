"""Multi-Task Zipping, Algorithm 1 of the paper: layer by layer, pair units, share their weights, correct the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from taskzip.assembly import SharedInputs, align_inputs, install_blocks
from taskzip.curvature import LayerStatistics, damped
from taskzip.difference import functional_difference
from taskzip.errors import InputError
from taskzip.graph import OUTPUT, Layer
from taskzip.matching import Matching, Pairs, match
from taskzip.members import Member
from taskzip.merging import merge_weights
from taskzip.observation import MaxRows
from taskzip.plan import Quota, SharePlan, as_plan
from taskzip.recalibration import batch_norm_statistics, least_squares, match_spread
from taskzip.retraining import Retraining
from taskzip.task import Task
from taskzip.zipped import LayerRecord, ZippedModel


@dataclass(frozen=True)
class Settings:
    """The options of `zip`, validated."""

    plan: SharePlan
    balance: tuple[float, ...]
    matching: Matching
    compensate: bool
    damping: float
    ridge: float
    max_rows: MaxRows
    retraining: Retraining
    seed: int


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
        tasks: two tasks, with networks of equally many layers; widths may differ.
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
    settings = Settings(
        as_plan(share),
        _balance(tasks, balance),
        _one_of("matching", matching, ("optimal", "greedy", "random")),
        compensate,
        _not_negative("damping", damping),
        _not_negative("ridge", ridge),
        _max_rows(max_rows),
        _retraining(retrain),
        _seed(seed),
    )
    members = [Member(task) for task in tasks]
    layers = _correspondence(members)
    _check_names("share", settings.plan.named(), layers)
    _check_names("retrain", settings.retraining.named(), layers)
    for member in members:
        member.check_orders(seed)
    zipped = ZippedModel({member.task.name: member.network for member in members})
    zipped.history.settings = _plain(settings, members)
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        todo = bar.add_task("zipping", total=len(layers))
        for layer in layers:
            bar.update(todo, description=f"zipping {layer[0].name}")
            record = _zip_layer(members, layer, settings)
            zipped.history.layers.append(record)
            if record.shared and (steps := settings.retraining.after(record.name)):
                settings.retraining.run(zipped, tasks, steps, seed)
            bar.advance(todo)
    return zipped.eval()


def _zip_layer(members: Sequence[Member], layers: Sequence[Layer], settings: Settings) -> LayerRecord:
    """One turn of Algorithm 1: what the layer reads, which units pair, their merged weights, the joint layer."""
    name = layers[0].name
    inputs = align_inputs(members, layers)
    obstacle = _obstacle(members, layers, inputs)
    quota = settings.plan.quota(name, min(layer.units for layer in layers))
    if obstacle and quota.pairs and name in settings.plan.named():
        raise InputError(f"layer {name!r} cannot be shared: {obstacle}. Leave it out of `share`.")
    sharing = not obstacle and quota.pairs > 0
    before = _size(members, layers)

    statistics = [_observe(m, x, settings, sharing) for m, x in zip(members, layers, strict=True)]
    weights = [_compensated(m, x, s, settings) for m, x, s in zip(members, layers, statistics, strict=True)]
    pairs = None
    if sharing:
        turn = _Turn(members, layers, inputs, [s for s in statistics if s is not None], settings)
        pairs = turn.pair(weights, quota)
    if pairs is not None and len(pairs.a):
        weights, merged = turn.merge(weights, pairs)
    for member, layer, s, w in zip(members, layers, statistics, weights, strict=True):
        _settle(member, layer, s, w)
    if pairs is None or not len(pairs.a):
        note = "" if all(layer.pinned == OUTPUT for layer in layers) else obstacle  # outputs are private, as they should
        return _record(members, layers, 0, 0.0, before, note)
    for member, layer, units in zip(members, layers, (pairs.a, pairs.b), strict=True):
        member.share(layer, name, _shared_first(units, layer.units), len(units))
        member.changed = True
    install_blocks(members, layers, inputs, len(pairs.a), merged)
    return _record(members, layers, len(pairs.a), float(pairs.cost.sum()), before, "")


@dataclass(frozen=True)
class _Turn:
    """What one layer's pairing and merging work with; weights are matrices [units, inputs * taps + 1], bias last."""

    members: Sequence[Member]
    layers: Sequence[Layer]
    inputs: SharedInputs
    statistics: Sequence[LayerStatistics]
    settings: Settings

    def pair(self, weights: Sequence[Tensor], quota: Quota) -> Pairs:
        """Choose the units to share, by the functional difference of their incoming weights from shared inputs."""
        difference = functional_difference(*self._compared(self._comparable(weights)), *self._curvatures)
        return match(
            difference,
            count=quota.pairs,
            threshold=quota.threshold,
            method=self.settings.matching,
            seed=self.settings.seed,
        )

    def merge(self, weights: Sequence[Tensor], pairs: Pairs) -> tuple[list[Tensor], Tensor]:
        """The tasks' weights with the paired rows merged, and the shared part of those rows by itself."""
        chosen = (pairs.a, pairs.b)
        rows = [w[units] for w, units in zip(self._comparable(weights), chosen, strict=True)]
        merged = merge_weights(self._compared(rows), self._curvatures)
        rows = [self._with_shared(t, w, merged) for t, w in enumerate(rows)]
        if self.settings.compensate and not any(layer.batch_norm for layer in self.layers):
            scale, shift = match_spread(self.statistics, rows, chosen, self.settings.balance)
            rows = [scale[:, None] * w for w in rows]
            merged = scale[:, None] * merged
            if self.inputs.bias:
                merged[:, -1] += shift
                rows = [self._with_shared(t, w, merged) for t, w in enumerate(rows)]
        return [w.index_copy(0, units, r) for w, units, r in zip(weights, chosen, rows, strict=True)], merged

    @cached_property
    def _curvatures(self) -> list[Tensor]:
        """H per task over the shared inputs, weighted, damped, with zeros for fictive connections."""
        found = []
        for t, (member, layer, s) in enumerate(zip(self.members, self.layers, self.statistics, strict=True)):
            # Batch-norm takes the mean off again, for each task by itself, so that only the spread matters.
            gram = s.rows * s.covariance() if layer.batch_norm else s.gram
            columns = self._columns(t)
            h = self.settings.balance[t] / member.samples * gram[columns[:, None], columns]
            found.append(self.inputs.with_fictive(damped(h, self.settings.damping), layer, (0, 1)))
        return found

    def _comparable(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Weights divided by what batch-norm will divide them by: a unit's scale must not matter (design 2.4)."""
        if not all(layer.batch_norm for layer in self.layers):
            return list(weights)
        return [w / m.batch_norm_scale(x)[:, None] for m, x, w in zip(self.members, self.layers, weights, strict=True)]

    def _compared(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The columns from shared inputs, the same for all tasks."""
        return [
            self.inputs.with_fictive(w[:, self._columns(t)], layer, (1,))
            for t, (layer, w) in enumerate(zip(self.layers, weights, strict=True))
        ]

    def _with_shared(self, task: int, rows: Tensor, merged: Tensor) -> Tensor:
        """A task's rows with the merged weights in the place of the shared columns."""
        return rows.index_copy(1, self._columns(task), self.inputs.without_fictive(merged, task, self.layers[task]))

    def _columns(self, task: int) -> Tensor:
        return self.inputs.columns(task, self.layers[task]).to(self.statistics[task].gram.device)


def _observe(member: Member, layer: Layer, settings: Settings, sharing: bool) -> LayerStatistics | None:
    """Lines 2 and 3 of Algorithm 1, where anything is to be done with it."""
    if not sharing and not (settings.compensate and member.changed and layer.solvable):
        return None
    changed = member.changed and not layer.reads_input
    return member.observer(settings.max_rows, settings.seed).observe(layer, changed=changed)


def _compensated(member: Member, layer: Layer, statistics: LayerStatistics | None, settings: Settings) -> Tensor:
    weights = member.weights(layer)
    if statistics is None or not settings.compensate or not member.changed or layer.reads_input or not layer.solvable:
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


def _obstacle(members: Sequence[Member], layers: Sequence[Layer], inputs: SharedInputs) -> str:
    """Why a layer has to stay private, or ""."""
    for member, layer in zip(members, layers, strict=True):
        if layer.pinned:
            return f"in {member.task.name}, {layer.pinned}"
    shapes = [f"{layer.kind} {'x'.join(map(str, layer.kernel))}".strip() for layer in layers]
    if len(set(shapes)) > 1:
        return f"a {shapes[0]} and a {shapes[1]} have no weights in common"
    if not inputs.size:
        return "no inputs in common (what it reads is not shared, or differs in size)"
    return ""


def _shared_first(units: Tensor, count: int) -> np.ndarray:
    first = units.cpu().numpy()
    return np.concatenate([first, np.setdiff1d(np.arange(count), first)])


def _size(members: Sequence[Member], layers: Sequence[Layer]) -> int:
    """Parameters of a layer in all networks, shared ones counted once."""
    parameters = {p for m, x in zip(members, layers, strict=True) for p in m.parameters(x)}
    return sum(p.numel() for p in parameters)


def _record(
    members: Sequence[Member], layers: Sequence[Layer], shared: int, cost: float, before: int, note: str
) -> LayerRecord:
    names, units = tuple(layer.name for layer in layers), tuple(layer.units for layer in layers)
    return LayerRecord(names[0], names, units, shared, cost, before, _size(members, layers), note)


# --- reading the arguments ----------------------------------------------------------------------------------------


def _checked(tasks: Sequence[Task]) -> Sequence[Task]:
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not all(isinstance(t, Task) for t in tasks):
        raise InputError("tasks must be a list of taskzip.Task objects.")
    if len(tasks) != 2:
        raise InputError(f"zip needs two tasks, got {len(tasks)}; more than two come in a later version.")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise InputError(f"two tasks are called {names[0]!r}: give each its own name.")
    for what, of in (("dtype", lambda p: p.dtype), ("device", lambda p: p.device)):
        found = [{of(p) for p in task.model.parameters() if p.is_floating_point()} for task in tasks]
        if found[0] != found[1] or len(found[0]) != 1:
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


def _retraining(retrain: int | Mapping[str, int] | Retraining | None) -> Retraining:
    settings = retrain if isinstance(retrain, Retraining) else Retraining(retrain or 0)
    steps = settings.steps.values() if isinstance(settings.steps, Mapping) else [settings.steps]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in steps):
        raise InputError(f"retrain={retrain!r} must be a number of steps, a dict of steps by layer, or a Retraining.")
    return settings


def _balance(tasks: Sequence[Task], balance: float | Sequence[float] | Mapping[str, float] | None) -> tuple[float, ...]:
    if balance is None:
        return (1 / max(len(tasks), 1),) * len(tasks)
    if isinstance(balance, Mapping):
        names = [task.name for task in tasks]
        if set(balance) != set(names):
            raise InputError(f"balance names {', '.join(map(str, balance))}, but the tasks are {', '.join(names)}.")
        balance = [balance[name] for name in names]
    try:
        weights = [float(b) for b in (balance if isinstance(balance, Iterable) else [balance, 1 - balance])]
    except (TypeError, ValueError) as error:
        raise InputError(f"balance {balance!r} must be a number, numbers in order, or a dict by task name.") from error
    if len(weights) != len(tasks) or not all(0 < b < 1 for b in weights) or abs(sum(weights) - 1) > 1e-6:
        raise InputError(f"balance {weights} must give each of the {len(tasks)} tasks a weight above 0, summing to 1.")
    return tuple(weights)


def _one_of(name: str, value: Any, known: Sequence[Any]) -> Any:
    if value not in known:
        raise InputError(f"{name}={value!r} is not known: choose one of {', '.join(map(repr, known))}.")
    return value


def _not_negative(name: str, value: float) -> float:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
        raise InputError(f"{name}={value!r} must be a number >= 0.")
    return float(value)


def _seed(value: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise InputError(f"seed={value!r} must be a whole number >= 0.")


def _max_rows(value: MaxRows) -> MaxRows:
    if value is None or value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise InputError(f"max_rows={value!r} must be a positive number of rows, 'auto', or None for every row.")


def _plain(settings: Settings, members: Sequence[Member]) -> dict[str, Any]:
    """The settings as JSON can hold them, for the checkpoint."""
    plain = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in ("plan", "retraining")}
    steps = settings.retraining.steps
    return {
        "share": settings.plan.as_dict(),
        **plain,
        "balance": list(settings.balance),
        "retrain": dict(steps) if isinstance(steps, Mapping) else steps,
        "samples": {member.task.name: member.samples for member in members},
    }
