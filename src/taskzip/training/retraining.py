"""Light retraining: a few steps of gradient descent on the joint network, with labels or taught by the originals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress, TextColumn
from torch import nn

from taskzip.errors import InputError
from taskzip.naming import key_of
from taskzip.randomness import checked_seed, seeded
from taskzip.tasks import Batch, Task, evaluating, in_eval_mode, keeping_modes, own_loss, run_batch
from taskzip.training.course import Course, Lesson, MakeOptimizer, missing_connections
from taskzip.training.masters import without_cached_casts
from taskzip.zipped import ZippedModel

Loss = Literal["labels", "distill"]
BatchNorm = Literal["frozen", "update"]


@dataclass(frozen=True)
class Retraining:
    """How `zip` retrains after each layer (line 10 of Algorithm 1), in the words of `retrain`.

    Args:
        steps: after every layer that shares anything, or a dict by layer name or glob; one left out is not retrained.
        loss: as in `retrain`.
        step_size: as in `retrain`.
        optimizer: as in `retrain`.
        batch_norm: as in `retrain`.

    Raises:
        InputError: a setting that cannot be used.
    """

    steps: int | Mapping[str, int]
    loss: Loss = "labels"
    step_size: float | None = None
    optimizer: MakeOptimizer | None = None
    batch_norm: BatchNorm = "frozen"

    def __post_init__(self) -> None:
        for steps in self.steps.values() if isinstance(self.steps, Mapping) else [self.steps]:
            if not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 0:
                raise InputError(f"steps={steps!r} must be a whole number >= 0.")
        if self.loss not in ("labels", "distill"):
            raise InputError(f"loss={self.loss!r} is not known: choose 'labels' or 'distill'.")
        given = self.step_size is not None
        if given and (not isinstance(self.step_size, (int, float)) or not 0 < self.step_size < math.inf):
            raise InputError(f"step_size={self.step_size!r} must be a number above 0.")
        if self.optimizer is not None and not callable(self.optimizer):
            raise InputError(f"optimizer={self.optimizer!r} must be a function from parameters to a torch optimizer.")
        if self.batch_norm not in ("frozen", "update"):
            raise InputError(f"batch_norm={self.batch_norm!r} is not known: choose 'frozen' or 'update'.")

    def named(self) -> Iterable[str]:
        """The layers that are named one by one."""
        return self.steps.keys() if isinstance(self.steps, Mapping) else ()

    def after(self, layer: str) -> int:
        """The steps after this layer."""
        if not isinstance(self.steps, Mapping):
            return int(self.steps)
        key = key_of(layer, self.steps)
        return 0 if key is None else int(self.steps[key])

    def check(self, tasks: Sequence[Task]) -> None:
        """Whether the tasks' data hold what the loss needs.

        Raises:
            InputError: batches without targets, though labels are to teach.
        """
        wanted = any(self.steps.values()) if isinstance(self.steps, Mapping) else self.steps
        for task in tasks if wanted and self.loss == "labels" else ():
            batch = next(task.batches())
            if task.targets(batch) is None and not _judges_itself(task, batch):
                raise InputError(
                    f"task {task.name!r}: its batches have no targets; pass loss='distill' to retrain without labels."
                )

    def run(
        self,
        zipped: ZippedModel,
        tasks: Sequence[Task],
        steps: int,
        *,
        seed: int,
        weights: Iterable[Sequence[nn.Parameter]] | None = None,
        progress: bool = False,
    ) -> list[dict[str, float]]:
        """Retrain, with everything checked already; `weights` are those of pruned layers, if not all are zipped yet."""
        if not steps:
            zipped.history.later.append({"retrained": 0, "loss": self.loss, "seed": seed})
            return []
        parameters = [p for p in zipped.parameters() if p.requires_grad]
        if not parameters:
            raise InputError(
                "all parameters of the joint network are frozen (requires_grad=False): nothing to retrain."
            )
        missing = missing_connections(zipped.layer_weights(pruned=True) if weights is None else weights)
        teachers = [task.model for task in tasks] if self.loss == "distill" else []
        with (
            seeded(seed),
            in_eval_mode(*teachers),
            _retraining_mode(zipped, self.batch_norm),
            without_cached_casts(),
            _losses_bar(progress) as bar,
        ):
            todo = bar.add_task("retraining", total=steps, losses="")

            def tell(losses: Mapping[str, float]) -> None:
                said = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
                bar.update(todo, advance=1, losses=said)

            lessons = [Lesson(task, steps, distill=self.loss == "distill") for task in tasks]
            statistics = list(zipped.buffers()) if self.batch_norm == "update" else []
            course = Course(zipped, lessons, parameters, missing, statistics, self.optimizer, self.step_size)
            losses = course.run(steps, tell)
        zipped.history.later.append(self._record(steps, course) | {"seed": seed})
        return losses

    def _record(self, steps: int, course: Course) -> dict[str, Any]:
        return {
            "retrained": steps,
            "loss": self.loss,
            "step_size": course.step_size if self.optimizer is None else None,
            "optimizer": type(course.optimizer).__name__,
            "batch_norm": self.batch_norm,
            "teaches": {lesson.task.name: str(lesson.teaching) for lesson in course.lessons if lesson.teaching},
            "held_out_loss": {"before": course.watch.start, "after": course.watch.best, "step": course.watch.step},
        }


def retrain(
    zipped: ZippedModel,
    tasks: Sequence[Task],
    steps: int = 100,
    *,
    loss: Loss = "labels",
    step_size: float | None = None,
    optimizer: MakeOptimizer | None = None,
    batch_norm: BatchNorm = "frozen",
    progress: bool = True,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Retrain a joint network lightly, in place, so that all tasks recover together.

    Every step draws one batch per task and steps on the sum of the tasks' losses, weighted by the balance of `zip`. The
    networks run in eval mode: dropout is off, and batch-norm uses its running statistics, which stay as they are
    (`batch_norm="frozen"`; its scale and shift are trained) or follow the batches (`"update"`). Weights that
    are exactly 0 stay 0 in pruned layers, where they are missing connections (Sec. 3.6). Parameters in half precision
    are optimized as copies in single precision, and stay in their type.

    The joint network never ends worse than it started: up to an eighth of each task's batches is held out (of a loader
    that shuffles, single samples of them are seen all the same; a task of one batch is watched on that), the loss on
    them is measured now and then, and the best state is kept. The history tells both losses, and what was taught.

    Args:
        zipped: the joint network.
        tasks: the tasks that it was made from; their data are read again from the start when they end.
        steps: how many.
        loss: "labels" for each task's own loss against its targets; "distill" to have the original networks teach,
            which needs no labels: the divergence from their class probabilities or answers of yes or no, else the
            squared error of values relative to the variance of theirs. Which it is, `Task.teach` says.
        step_size: relative step of the default optimizer, Adam with a learning rate per tensor of `step_size` times the
            tensor's root mean square, annealed to zero along a cosine. Merged layers differ in scale a hundredfold, and
            one learning rate cannot serve them all. Default: the first of 0.01, 0.003 and 0.001 with which an
            eighth of the steps does not raise the loss of the held-out batches; steps that do are undone and come on
            top.
        optimizer: instead, a function from parameters to any torch optimizer, used without a schedule.
        batch_norm: "frozen" or "update".
        progress: show a progress bar with the losses on standard error.
        seed: of loaders that shuffle with torch's global generator, which is left as it was.

    Returns:
        Per step, the loss of each task on its batch, without those of trials that were undone.

    Raises:
        InputError: other tasks than those zipped, missing targets, settings that cannot be used, or a loss that becomes
            NaN or infinite.
    """
    settings = Retraining(steps, loss, step_size, optimizer, batch_norm)
    names = [task.name for task in tasks]
    if sorted(names) != sorted(zipped):
        raise InputError(
            f"the joint network has the tasks {', '.join(zipped)}, but {', '.join(names) or 'none'} were given."
        )
    for task in tasks:
        task.check_data()
    settings.check(tasks)
    return settings.run(zipped, tasks, int(steps), seed=checked_seed(seed), progress=progress)


def _losses_bar(progress: bool) -> Progress:
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[losses]}"))
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress)


@contextmanager
def _retraining_mode(zipped: ZippedModel, batch_norm: BatchNorm) -> Iterator[None]:
    with keeping_modes(zipped):
        for module in zipped.modules():
            module.training = batch_norm == "update" and isinstance(module, nn.modules.batchnorm._BatchNorm)
        yield


def _judges_itself(task: Task, batch: Batch) -> bool:
    """Whether the network returns a loss of its own, from targets that go by other names."""
    if task.loss is not None:
        return False
    with evaluating(task.model):
        return own_loss(run_batch(task, task.model, batch, 0)) is not None
