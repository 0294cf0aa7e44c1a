"""Multi-Task Zipping, Algorithm 1 of the paper: layer by layer, pair units, share their weights, correct the rest."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from rich.console import Console
from rich.progress import Progress

from taskzip.algebra import Connections, Matching
from taskzip.copying import check_kind
from taskzip.errors import InputError, TaskzipWarning
from taskzip.naming import check_names
from taskzip.observing import MaxRows
from taskzip.planning import Budget, Curve, MaxDrop, SearchPlan, Share, SharePlan, search
from taskzip.randomness import seeded
from taskzip.tasks import Task, has_numbers
from taskzip.training import Retraining
from taskzip.zipped import ZippedModel, listed, record_answers, record_flops
from taskzip.zipping.correspondence import Layers, correspond
from taskzip.zipping.joining_order import joining_order
from taskzip.zipping.members import Member
from taskzip.zipping.resizing import equal_sizes
from taskzip.zipping.settings import Compensation, Norms, Residual, Settings, read_settings
from taskzip.zipping.zipper import Zipper, layer_name

log = logging.getLogger("taskzip")
"""Says at level INFO what became of each layer, and how long it took."""


def zip_tasks(
    tasks: Sequence[Task],
    *,
    share: float | Mapping[str, float] | SharePlan | SearchPlan,
    balance: float | Sequence[float] | Mapping[str, float] | None = None,
    matching: Matching = "optimal",
    compensate: Compensation = True,
    adapt: bool | None = None,
    spread: bool | None = None,
    own_scale: bool | None = None,
    residual: Residual = "coupled",
    aligned: bool | None = None,
    cross: bool = True,
    connections: Connections = "denser",
    batch_norm: Norms = "private",
    layers: Layers | None = None,
    damping: float = 1e-2,
    ridge: float | None = None,
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
        tasks: two or more tasks; widths, depths and inputs may differ. They are added one after another to the joint
            network (Sec. 3.4), the widest first, in whatever order they are given; a unit of a later task may join
            units that others share already.
        share: how much to share: a fraction of each hidden layer's units (float; of the smaller one), a dict by layer
            name or glob ("encoder.*") with fractions (float) or counts (int; an attention head counts as one), or
            `Threshold(eps)`; or what is wanted of it, `Budget(size)` or `MaxDrop(points, data)`, for which the
            networks are zipped several times. A layer's own name goes before globs, and of several globs the one with
            most characters that are no wildcards counts.
            Layers are called as in the first task's network.
        balance: the weight of each task's error (alpha): a dict by task name or a sequence, summing to 1; a single
            number is the first task's. Default: equal.
        matching: "optimal" (exact minimum-cost pairs), "greedy" (the paper's) or "random".
        compensate: re-solve each task's weights from the changed inputs by least squares before merging (design 2.5);
            "output": those of output layers only. The paper's own procedure is `matching="greedy", compensate=False`,
            for residual networks with `residual="independent"`, and `retrain` after each layer.
        adapt: let a unit's private weights, those of inputs that no other task has, follow the shared ones as these are
            merged; the units are then paired by what is left of the error. Never worse for the layer than private
            weights that stay. Default: with full compensation.
        spread: bring merged units back to the mean and spread that they had, averaged over the tasks, where they do not
            have a scale of their own. Default: with full compensation.
        own_scale: whether every task has a scale and a shift of its own for each shared unit of torch's own linear
            layers and convolutions, which come out of least squares: two numbers per unit and task for much lower
            errors. What units give then differs from task to task, so that `zipped(x)` computes hardly anything once
            for all. Batch-norm does the same, where there is one. Default: with full compensation, unless the tasks are
            to have a common trunk (`cross=False`, `batch_norm="fold"`).
        residual: how the layers that write into one residual stream find their pairs (Sec. 3.7). "coupled": one order
            of the stream's units for all of them, by their mean functional difference; nothing is re-ordered at run
            time. "independent": each by itself, and a gather restores the order of the stream.
        aligned: whether a later layer shares its weights over all inputs, as if all units of the layer before it were
            paired (Sec. 3.7), or only over inputs whose units share their weights. Units of residual streams are paired
            in any case. Default: where there are residual streams.
        cross: whether a shared unit also has private weights, from the private units of each of its tasks. Without them
            it reads only units that all of its tasks share, and what the others gave it is made up for by least
            squares: shared units of all layers are then one network of their own, which `zipped(x)` and ONNX files
            compute once for all tasks. Inputs are then not aligned, and of residual streams it reads the units that all
            layers before it share.
        connections: of pruned networks, which a merged unit has: those of the unit that has more of them ("denser",
            Sec. 3.6), or all that any of its units has ("any"), which loses less and saves fewer. Pruned is a layer of
            which more than 5% of the weights, or of those of all such layers, are exactly 0, and not because weights
            were rounded to a grid. Other zeros are weights like any other.
        batch_norm: "private": every task keeps its own, and its statistics follow the merged weights (design 2.4);
            "fold": it becomes part of the layer directly before it, else of the layers that read it (behind an
            activation, where these do not pad and nothing but pooling and the like stands between), so that fully
            shared layers are common to all tasks. What can be neither stays private, and a warning says which and why.
        layers: which layers belong together: "order", "name", or a dict from the first task's layers to those of the
            second, or to dicts by task name. Default: by order where the networks have the same kinds of layers in the
            same order, else by what the layers are (kind, kernel, what they read and write, size, name).
            A layer without a partner stays private.
        damping: added to each curvature, relative to the mean of its diagonal.
        ridge: strength with which compensation holds on to the present weights, relative to the inputs' mean square.
            Less gives a slightly better start, and larger weights, which retrain worse.
        max_rows: how many rows (samples times output positions) a layer's curvature is summed over: a number, "auto"
            (50 per column), or None for all.
        retrain: steps of light retraining after each layer that shares anything (line 10 of Algorithm 1): a number, a
            dict by layer name or glob, or `Retraining` for more settings. Default: none.
        progress: show a progress bar on standard error.
        seed: for sampled rows, random matching and retraining.

    Returns:
        The joint network, in eval mode.

    Raises:
        InputError: tasks, data or settings that cannot be used; the message names task, layer and shapes.
        GraphError: a network that torch.export cannot follow, or that was read wrongly.
    """
    tasks = _checked(tasks)
    wanted = share if isinstance(share, (Budget, MaxDrop)) else None
    settings = read_settings(
        [task.name for task in tasks],
        share=1.0 if isinstance(share, (Budget, MaxDrop)) else share,
        balance=balance,
        matching=matching,
        compensate=compensate,
        adapt=adapt,
        spread=spread,
        own_scale=own_scale,
        residual=residual,
        aligned=aligned,
        cross=cross,
        connections=connections,
        batch_norm=batch_norm,
        layers=layers,
        damping=damping,
        ridge=ridge,
        max_rows=max_rows,
        retrain=retrain,
        seed=seed,
    )

    def zip_with(plan: Share) -> tuple[ZippedModel, list[Curve]]:
        return _zip(tasks, replace(settings, plan=plan), progress=False)

    if wanted is None:
        zipped, _ = _zip(tasks, settings, progress)
        if isinstance(settings.plan, Share):
            settings.plan.warn_of_ones()
    else:
        zipped = search(wanted, tasks, zip_with, seed=settings.seed, progress=progress)
    with seeded(settings.seed):
        record_flops(zipped, tasks)
        record_answers(zipped, tasks)
    _warn(zipped, share)
    return zipped


def _zip(tasks: Sequence[Task], settings: Settings, progress: bool) -> tuple[ZippedModel, list[Curve]]:
    """The joint network, and what sharing cost and saved in each layer."""
    with seeded(settings.seed):
        return _zip_layers(tasks, settings, progress)


def _zip_layers(tasks: Sequence[Task], settings: Settings, progress: bool) -> tuple[ZippedModel, list[Curve]]:
    """Algorithm 1: layer by layer, each from inputs computed by the networks as zipped so far."""
    fold, relative = settings.batch_norm == "fold", settings.relative
    members = [
        Member(task, settings.seed, number=t, fold_batch_norm=fold, equal_sizes=relative)
        for t, task in enumerate(tasks)
    ]
    _check_layers(members)
    layers = correspond([task.name for task in tasks], [m.structure for m in members], settings.layers)
    known = list(dict.fromkeys(layer.name for layer in layers if not layer.alone))
    check_names("share", settings.plan.named(), known)
    check_names("retrain", settings.retraining.named(), known)
    settings.retraining.check(tasks)
    if relative:
        equal_sizes(members, layers, settings.seed)
    zipped = ZippedModel({member.task.name: member.network for member in members})
    _say_what_is_not_folded(members)
    zipped.history.settings = settings.as_dict() | {
        "samples": {m.task.name: m.samples for m in members},
        "folded": {m.task.name: m.folded for m in members},
        "unfolded": {m.task.name: m.unfolded for m in members},
        "pruned": {m.task.name: sorted(m.pruned) for m in members},
        "connections": {m.task.name: m.connections() for m in members},
    }
    if any(m.structure.unreached for m in members):
        zipped.history.settings["unreached"] = {m.task.name: m.structure.unreached_in_words() for m in members}
    with ExitStack() as ending, Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        for member in members:
            ending.callback(member.forwards.close)
        todo = bar.add_task("putting residual streams into order", total=len(layers))
        order = joining_order(members, layers)
        layers = [layer.renumbered(order) for layer in layers]
        balance = tuple(settings.balance[t] for t in order)
        zipper = Zipper([members[t] for t in order], layers, replace(settings, balance=balance))
        for layer in layers:
            bar.update(todo, description=f"zipping {layer_name(layer)}")
            start = time.perf_counter()
            record = zipper.zip(layer)
            seconds = time.perf_counter() - start
            log.info("%s: %d of %s rows shared, %.1f s", record.name, record.shared, record.units, seconds)
            zipped.history.layers.append(record)
            if record.shared and (steps := settings.retraining.after(record.name)):
                weights = [weight for member in members for weight in member.pruned_weights()]
                settings.retraining.run(zipped, tasks, steps, seed=settings.seed, weights=weights)
                for member in members:
                    member.changed = True
            bar.advance(todo)
        zipper.restore_scales()
    return zipped.eval(), zipper.recorder.curves


def _say_what_is_not_folded(members: Sequence[Member]) -> None:
    for member in members:
        if member.unfolded:
            said = f"batch_norm='fold': task {member.task.name!r} keeps batch-norm private: {listed(member.unfolded)}."
            log.info(said)
            warnings.warn(said, TaskzipWarning, stacklevel=2)


def _checked(tasks: Sequence[Task]) -> Sequence[Task]:
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not all(isinstance(t, Task) for t in tasks):
        raise InputError("tasks must be a list of taskzip.Task objects.")
    if len(tasks) < 2:
        raise InputError(f"zip needs at least two tasks, got {len(tasks)}.")
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two tasks are called {twice!r}: give each its own name.")
    for task in tasks:
        check_kind(task.model, f"task {task.name!r}: ")
    for what, of in (("dtype", lambda p: p.dtype.to_real()), ("device", lambda p: p.device)):
        found = [{of(p) for p in task.model.parameters() if has_numbers(p)} for task in tasks]
        if any(each != found[0] for each in found) or len(found[0]) != 1:
            listed = "; ".join(
                f"{n!r} has {', '.join(sorted(map(str, f))) or 'no parameters'}"
                for n, f in zip(names, found, strict=True)
            )
            raise InputError(f"all parameters must have one {what}: {listed}. Convert the models with .to(...) first.")
    return tasks


def _check_layers(members: Sequence[Member]) -> None:
    """Whether there is anything to zip, or else what there is instead."""
    if any(m.structure.layers for m in members):
        return
    said = {rest.said.removeprefix("private: "): rest.name for m in members for rest in reversed(m.structure.rest)}
    if said:
        reasons = "; ".join(f"{name} ({why})" for why, name in said.items())
        raise InputError(f"no linear layer or convolution of the networks can be zipped: {reasons}.")


def _warn(zipped: ZippedModel, share: object) -> None:
    """Say what is likely not what was wanted: parts that no call reached, and all shared of nothing."""
    for name, said in zipped.history.settings.get("unreached", {}).items():
        if said:
            warnings.warn(f"task {name!r}: {said}", TaskzipWarning, stacklevel=3)
    layers = zipped.history.layers
    if isinstance(share, float) and share == 1.0 and not any(layer.shared for layer in layers):
        private = [f"{layer.name} ({layer.note})" for layer in layers if layer.note]
        reasons = "; ".join(private) or "all layers are output layers"
        warnings.warn(f"nothing could be shared: {reasons}. `taskzip.inspect` says more.", TaskzipWarning, stacklevel=3)
