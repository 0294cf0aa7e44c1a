"""Light retraining: a few steps of gradient descent on the joint network, with labels or taught by the originals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress, TextColumn
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taskzip.errors import InputError
from taskzip.observation import evaluating, run_batch
from taskzip.task import Batch, Task
from taskzip.zipped import ZippedModel

Loss = Literal["labels", "distill"]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

SMALLEST_RMS = 1e-3
"""A tensor whose root mean square is below this (zero biases) still moves as if it had this one."""


@dataclass(frozen=True)
class Retraining:
    """How `zip` retrains after each layer (line 10 of Algorithm 1), in the words of `retrain`.

    Args:
        steps: after every layer that shares anything, or a dict by layer name; a layer left out is not retrained.
        loss, step_size, optimizer, batch_norm: as in `retrain`.
    """

    steps: int | Mapping[str, int]
    loss: Loss = "labels"
    step_size: float = 1e-2
    optimizer: MakeOptimizer | None = None
    batch_norm: Literal["frozen", "update"] = "frozen"

    def named(self) -> Iterable[str]:
        """The layers that are named one by one."""
        return self.steps.keys() if isinstance(self.steps, Mapping) else ()

    def run(self, zipped: ZippedModel, tasks: Sequence[Task], steps: int, seed: int) -> None:
        """Retrain a half-zipped network."""
        retrain(
            zipped,
            tasks,
            steps,
            loss=self.loss,
            step_size=self.step_size,
            optimizer=self.optimizer,
            batch_norm=self.batch_norm,
            progress=False,
            seed=seed,
        )

    def after(self, layer: str) -> int:
        """The steps after this layer."""
        return self.steps.get(layer, 0) if isinstance(self.steps, Mapping) else self.steps


def retrain(
    zipped: ZippedModel,
    tasks: Sequence[Task],
    steps: int = 100,
    *,
    loss: Loss = "labels",
    step_size: float = 1e-2,
    optimizer: MakeOptimizer | None = None,
    batch_norm: Literal["frozen", "update"] = "frozen",
    progress: bool = True,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Retrain a joint network lightly, in place, so that all tasks recover together.

    Every step draws one batch per task and steps on the sum of the tasks' losses, weighted by the balance of `zip`. The
    networks run in eval mode: dropout is off, and batch-norm uses its running statistics, which stay as they are
    (`batch_norm="frozen"`; its scale and shift are trained) or follow the batches (`"update"`).

    Args:
        zipped: the joint network.
        tasks: the tasks that it was made from; their data are read again from the start when they end.
        steps: how many.
        loss: "labels" for each task's own loss against its targets; "distill" to have the original networks teach,
            which needs no labels: cross-entropy against their softened answers where the task's loss is cross-entropy,
            else the squared error relative to the variance of their answers.
        step_size: relative step of the default optimizer, Adam with a learning rate per tensor of `step_size` times the
            tensor's root mean square, annealed to zero along a cosine. Merged layers differ in scale a hundredfold, and
            one learning rate cannot serve them all.
        optimizer: instead, a function from parameters to any torch optimizer, used without a schedule.
        batch_norm: "frozen" or "update".
        progress: show a progress bar with the losses on standard error.
        seed: of dropout-like randomness and of loaders that shuffle with torch's global generator, which is left as it
            was.

    Returns:
        Per step, the loss of each task.

    Raises:
        InputError: other tasks than those zipped, missing targets, or a loss that becomes NaN or infinite.
    """
    _check(zipped, tasks, steps, loss, batch_norm)
    weights = _balance(zipped, tasks)
    chosen = [p for p in zipped.parameters() if p.requires_grad]
    stepper = relative_adam(chosen, step_size) if optimizer is None else optimizer(chosen)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, max(steps, 1)) if optimizer is None else None
    losses: list[dict[str, float]] = []
    with (
        torch.random.fork_rng(),
        _retraining_mode(zipped, batch_norm),
        Progress(
            *Progress.get_default_columns(),
            TextColumn("{task.fields[losses]}"),
            console=Console(stderr=True),
            transient=True,
            disable=not progress,
        ) as bar,
    ):
        torch.manual_seed(seed)
        streams = [_endless(task) for task in tasks]
        todo = bar.add_task("retraining", total=steps, losses="")
        for _ in range(steps):
            stepper.zero_grad(set_to_none=True)
            now = {}
            for task, weight, stream in zip(tasks, weights, streams, strict=True):
                value = _loss(zipped, task, next(stream), loss)
                (weight * value).backward()
                now[task.name] = float(value.detach())
            _check_finite(now, len(losses))
            stepper.step()
            if schedule is not None:
                schedule.step()
            losses.append(now)
            bar.update(todo, advance=1, losses="  ".join(f"{name} {value:.4f}" for name, value in now.items()))
        stepper.zero_grad(set_to_none=True)
    zipped.history.later.append(
        {
            "retrained": steps,
            "loss": loss,
            "step_size": step_size if optimizer is None else None,
            "optimizer": type(stepper).__name__,
            "batch_norm": batch_norm,
            "seed": seed,
        }
    )
    return losses


def relative_adam(parameters: Iterable[nn.Parameter], step_size: float) -> torch.optim.Adam:
    """Adam whose step on each tensor is `step_size` times the tensor's root mean square."""
    return torch.optim.Adam(
        [
            {"params": [p], "lr": step_size * max(float(p.detach().square().mean().sqrt()), SMALLEST_RMS)}
            for p in parameters
        ]
    )


def distillation_loss(task: Task, output: Any, taught: Any) -> Tensor:
    """How far a network's output is from its teacher's, without labels; averaged over the tensors of the output."""
    pairs = list(zip(pytree.tree_leaves(output), pytree.tree_leaves(taught), strict=True))
    pairs = [(y, t) for y, t in pairs if isinstance(y, Tensor) and y.is_floating_point() and y.requires_grad]
    if task.loss is F.cross_entropy:
        terms = [
            F.kl_div(F.log_softmax(y, 1), F.log_softmax(t, 1), log_target=True, reduction="sum")
            * y.shape[1]
            / y.numel()
            for y, t in pairs
        ]
    else:
        terms = [F.mse_loss(y, t) / t.var(correction=0).clamp_min(torch.finfo(t.dtype).tiny) for y, t in pairs]
    if not terms:
        raise InputError(f"task {task.name!r}: its output has no floating-point tensor to distil.")
    return torch.stack(terms).mean()


def _loss(zipped: ZippedModel, task: Task, batch: Batch, loss: Loss) -> Tensor:
    output = run_batch(task, zipped[task.name], batch, 0)
    if loss == "distill":
        with evaluating(task.model):
            taught = task.run(task.model, batch)
        return distillation_loss(task, output, taught)
    targets = task.targets(batch)
    if targets is None:
        raise InputError(
            f"task {task.name!r}: its batches have no targets; pass loss='distill' to retrain without labels."
        )
    return task.loss(output, targets)


def _endless(task: Task) -> Iterator[Batch]:
    while True:
        yield from task.batches()


@contextmanager
def _retraining_mode(zipped: ZippedModel, batch_norm: str) -> Iterator[None]:
    modes = {module: module.training for module in zipped.modules()}
    try:
        for module in zipped.modules():
            module.training = batch_norm == "update" and isinstance(module, nn.modules.batchnorm._BatchNorm)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _balance(zipped: ZippedModel, tasks: Sequence[Task]) -> list[float]:
    names = list(zipped)
    return [zipped.history.settings["balance"][names.index(task.name)] for task in tasks]


def _check(zipped: ZippedModel, tasks: Sequence[Task], steps: int, loss: str, batch_norm: str) -> None:
    names = [task.name for task in tasks]
    if sorted(names) != sorted(zipped):
        raise InputError(
            f"the joint network has the tasks {', '.join(zipped)}, but {', '.join(names) or 'none'} were given."
        )
    if steps < 0:
        raise InputError(f"steps={steps} must not be negative.")
    if loss not in ("labels", "distill"):
        raise InputError(f"loss={loss!r} is not known: choose 'labels' or 'distill'.")
    if batch_norm not in ("frozen", "update"):
        raise InputError(f"batch_norm={batch_norm!r} is not known: choose 'frozen' or 'update'.")
    for task in tasks:
        task.check_data()


def _check_finite(losses: Mapping[str, float], step: int) -> None:
    for name, value in losses.items():
        if not torch.isfinite(torch.tensor(value)):
            raise InputError(
                f"task {name!r}: the loss is {value} at step {step}: take a smaller step_size, or check the targets."
            )
