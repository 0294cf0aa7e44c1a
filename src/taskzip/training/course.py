"""A course of retraining: gradient descent on all tasks together, watched on what is held out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taskzip.errors import InputError
from taskzip.tasks import Batch, Task, evaluating, label_loss, run_batch, samples_in
from taskzip.training.distillation import Teaching, teaching
from taskzip.training.masters import Masters
from taskzip.training.watching import Held, Watch, looks
from taskzip.zipped import ZippedModel

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

STEP_SIZES = (1e-2, 3e-3, 1e-3)
"""Those that are tried, in this order, where none is given."""

PER_TRIAL = 8
"""A trial takes one step in so many, and no more than `MOST_TRIED`."""

MOST_TRIED = 20

SMALLEST_RMS = 1e-3
"""A tensor whose root mean square is below this (zero biases) still moves as if it had this one."""

log = logging.getLogger("taskzip")
"""Says at level INFO what is taught, and which step size was chosen."""


class Lesson:
    """What one task's network learns from: labels, or its original network; and what of its data is held out."""

    def __init__(self, task: Task, steps: int, *, distill: bool) -> None:
        self.task, self.held = task, Held(task, steps)
        self.teaching: Teaching | None = None
        self._taught: list[Any] = []
        if distill:
            with torch.no_grad():
                self._taught = [run_batch(task, task.model, batch, 0) for batch in self.held.batches]
            examples = zip(self._taught, map(task.targets, self.held.batches), strict=True)
            self.teaching = teaching(task, list(examples))
            log.info("%s: its original network teaches %s", task.name, self.teaching)

    def loss(self, network: nn.Module, batch: Batch, index: int) -> Tensor:
        """On one batch, whose number is only for errors."""
        output = run_batch(self.task, network, batch, index)
        if self.teaching is None:
            return label_loss(self.task, output, self.task.targets(batch))
        with torch.no_grad():
            taught = run_batch(self.task, self.task.model, batch, index)
        return self.teaching.loss(output, taught)

    def held_out_loss(self, network: nn.Module) -> float:
        """The mean over the samples that are held out."""
        total = samples = 0.0
        for index, batch in enumerate(self.held.batches):
            output = run_batch(self.task, network, batch, index)
            if self.teaching is None:
                loss = label_loss(self.task, output, self.task.targets(batch))
            else:
                loss = self.teaching.loss(output, self._taught[index])
            total += float(loss) * samples_in(batch)
            samples += samples_in(batch)
        return total / samples


class Course:
    """One run of retraining, in place.

    Attributes:
        lessons: one for each task.
        step_size: the present one.
        optimizer: the present one.
        watch: what was seen on held-out batches.
    """

    def __init__(
        self,
        zipped: ZippedModel,
        lessons: Sequence[Lesson],
        parameters: Sequence[nn.Parameter],
        missing: Sequence[tuple[nn.Parameter, Tensor]],
        statistics: Sequence[Tensor],
        make: MakeOptimizer | None,
        step_size: float | None,
    ) -> None:
        """Measure the start.

        Args:
            zipped: the joint network.
            lessons: one for each task.
            parameters: those to train.
            missing: where parameters stay 0.
            statistics: buffers that change as well.
            make: the optimizer, if it is not Adam with relative steps.
            step_size: of that; by default the first of `STEP_SIZES` that does no harm in a short trial.

        Raises:
            InputError: a loss that is NaN or infinite.
        """
        self.lessons = lessons
        self._networks = [zipped[lesson.task.name] for lesson in lessons]
        self._balance = [balance_of(zipped, lesson.task) for lesson in lessons]
        self._parameters, self._missing, self._make = parameters, missing, make
        self._masters = Masters(parameters)
        self._streams = [lesson.held.others() for lesson in lessons]
        self._chooses = make is None and step_size is None
        self.step_size = STEP_SIZES[0] if step_size is None else step_size
        self.optimizer = self._optimizer()
        self.watch = Watch(self._held_out_loss, [*parameters, *self._masters.copies, *statistics])
        for lesson, loss in zip(lessons, self._held_out, strict=True):
            if not math.isfinite(loss):
                raise InputError(
                    f"task {lesson.task.name!r}: the loss of its held-out batches is {loss}: check the targets."
                )

    def run(self, steps: int, tell: Callable[[Mapping[str, float]], None]) -> list[dict[str, float]]:
        """All steps, then back to the best state; the losses of each step, which are told at once.

        Steps of trials that did harm come on top, at most a quarter of all.
        """
        losses = self._tried(min(MOST_TRIED, max(1, round(steps / PER_TRIAL))), tell) if self._chooses else []
        losses += self._steps(steps - len(losses), tell, looks(steps - len(losses)), len(losses))
        self._masters.forget_gradients()
        self.watch.restore()
        return losses

    def _tried(self, steps: int, tell: Callable[[Mapping[str, float]], None]) -> list[dict[str, float]]:
        """Take the first step size of which a few annealed steps do no harm, and go on from there; their losses.

        The largest is best in the long run, though smaller ones often go farther in a few steps. Where all do harm it
        is the smallest, from the start.
        """
        for self.step_size in STEP_SIZES:
            self.optimizer = self._optimizer()
            losses = self._steps(steps, tell, (), 0)
            harmless = self.watch.look(steps) <= self.watch.start
            log.info("step_size %g: %s on held-out batches", self.step_size, "no harm" if harmless else "worse")
            if harmless:
                return losses
            self.watch.restore()
        self.optimizer = self._optimizer()
        return losses

    def _steps(
        self, steps: int, tell: Callable[[Mapping[str, float]], None], when: Collection[int], before: int
    ) -> list[dict[str, float]]:
        """So many steps, annealed to zero, with looks after some of them."""
        losses = []
        for step in range(steps):
            if self._make is None:
                _anneal(self.optimizer, step / steps)
            losses.append(self._step([next(stream) for stream in self._streams], before + step))
            tell(losses[-1])
            if step + 1 in when:
                self.watch.look(before + step + 1)
        self._check_weights()
        return losses

    def _step(self, batches: Sequence[Batch], step: int) -> dict[str, float]:
        losses = self._backward(batches, step)
        if self._masters.take_gradients():
            self.optimizer.step()
        with torch.no_grad():
            for weight, zeros in self._missing:
                self._masters.of(weight).masked_fill_(zeros, 0)
        self._masters.give_values()
        return losses

    def _backward(self, batches: Sequence[Batch], step: int) -> dict[str, float]:
        """Gradients of the balanced sum of the losses on one batch per task; the losses."""
        losses = {}
        self._masters.forget_gradients()
        for lesson, network, batch, balance in zip(self.lessons, self._networks, batches, self._balance, strict=True):
            loss = lesson.loss(network, batch, step)
            value = losses[lesson.task.name] = float(loss.detach())
            if not math.isfinite(value):
                raise InputError(
                    f"task {lesson.task.name!r}: the loss is {value} at step {step}: zip again and take a smaller "
                    f"step_size, or check the targets."
                )
            if loss.requires_grad:  # else no parameter of this task is trained
                (self._masters.scale * balance * loss).backward()
        return losses

    def _held_out_loss(self) -> float:
        """The balanced sum over the tasks."""
        with evaluating(*self._networks):
            pairs = zip(self.lessons, self._networks, strict=True)
            self._held_out = [lesson.held_out_loss(network) for lesson, network in pairs]
        return sum(balance * loss for balance, loss in zip(self._balance, self._held_out, strict=True))

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = self._masters.parameters
        return relative_adam(parameters, self.step_size) if self._make is None else self._make(parameters)

    def _check_weights(self) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in self._parameters):
            raise InputError(
                "the weights became NaN or infinite while retraining: zip again, with a smaller step_size."
            )


def missing_connections(weights: Iterable[Sequence[nn.Parameter]]) -> list[tuple[nn.Parameter, Tensor]]:
    """Where weights are exactly 0; a layer that is 0 everywhere was made so, not pruned."""
    pruned = {p for weight in weights if any(p.count_nonzero() for p in weight) for p in weight}
    return [(p, p == 0) for p in pruned if p.requires_grad and p.count_nonzero() < p.numel()]


def relative_adam(parameters: Iterable[nn.Parameter], step_size: float) -> torch.optim.Adam:
    """Adam whose step on each tensor is `step_size` times the tensor's root mean square."""
    sizes = [(p, max(float(p.detach().abs().square().mean().sqrt()), SMALLEST_RMS)) for p in parameters if p.numel()]
    return torch.optim.Adam([{"params": [p], "lr": step_size * size} for p, size in sizes])


def _anneal(optimizer: torch.optim.Optimizer, done: float) -> None:
    """Lower the learning rates along a cosine, after this part of all steps."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 + math.cos(math.pi * done)) / 2


def balance_of(zipped: ZippedModel, task: Task) -> float:
    """The weight of a task's error, as `zip` was told."""
    return float(zipped.history.settings["balance"][list(zipped).index(task.name)])
