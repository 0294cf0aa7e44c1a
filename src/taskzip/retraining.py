"""Light retraining: a few steps of gradient descent on the joint network, with labels or taught by the originals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress, TextColumn
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taskzip.errors import InputError
from taskzip.naming import key_of
from taskzip.observation import in_eval_mode, keeping_modes, run_batch
from taskzip.randomness import checked_seed, seeded
from taskzip.task import Batch, Task
from taskzip.zipped import ZippedModel

Loss = Literal["labels", "distill"]
BatchNorm = Literal["frozen", "update"]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

SMALLEST_RMS = 1e-3
"""A tensor whose root mean square is below this (zero biases) still moves as if it had this one."""


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
    step_size: float = 1e-2
    optimizer: MakeOptimizer | None = None
    batch_norm: BatchNorm = "frozen"

    def __post_init__(self) -> None:
        for steps in self.steps.values() if isinstance(self.steps, Mapping) else [self.steps]:
            if not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 0:
                raise InputError(f"steps={steps!r} must be a whole number >= 0.")
        if self.loss not in ("labels", "distill"):
            raise InputError(f"loss={self.loss!r} is not known: choose 'labels' or 'distill'.")
        if not isinstance(self.step_size, (int, float)) or not 0 < self.step_size < math.inf:
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
            if task.targets(next(task.batches())) is None:
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
        parameters = [p for p in zipped.parameters() if p.requires_grad]
        if not parameters:
            raise InputError(
                "all parameters of the joint network are frozen (requires_grad=False): nothing to retrain."
            )
        own = self.optimizer is None
        optimizer = relative_adam(parameters, self.step_size) if self.optimizer is None else self.optimizer(parameters)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1)) if own else None
        teachers = [task.model for task in tasks] if self.loss == "distill" else []
        losses = []
        missing = missing_connections(zipped.layer_weights(pruned=True) if weights is None else weights)
        with (
            seeded(seed),
            in_eval_mode(*teachers),
            _retraining_mode(zipped, self.batch_norm),
            _losses_bar(progress) as bar,
        ):
            streams = [_endless(task) for task in tasks]
            todo = bar.add_task("retraining", total=steps, losses="")
            for step in range(steps):
                optimizer.zero_grad(set_to_none=True)
                now = self._backward(zipped, tasks, [next(stream) for stream in streams], step)
                optimizer.step()
                with torch.no_grad():
                    for weight, zeros in missing:
                        weight.masked_fill_(zeros, 0)
                if schedule is not None:
                    schedule.step()
                losses.append(now)
                bar.update(todo, advance=1, losses="  ".join(f"{name} {value:.4f}" for name, value in now.items()))
            optimizer.zero_grad(set_to_none=True)
        if not all(bool(torch.isfinite(p).all()) for p in parameters):
            raise InputError(
                "the weights became NaN or infinite while retraining: zip again, with a smaller step_size."
            )
        zipped.history.later.append(self._record(steps, type(optimizer).__name__, seed))
        return losses

    def _backward(
        self, zipped: ZippedModel, tasks: Sequence[Task], batches: Sequence[Batch], step: int
    ) -> dict[str, float]:
        """Gradients of the balanced sum of the losses on one batch per task; the losses."""
        losses = {}
        for task, batch in zip(tasks, batches, strict=True):
            loss = self._loss(task, run_batch(task, zipped[task.name], batch, step), batch)
            (balance_of(zipped, task) * loss).backward()
            losses[task.name] = float(loss.detach())
            if not math.isfinite(losses[task.name]):
                raise InputError(
                    f"task {task.name!r}: the loss is {losses[task.name]} at step {step}: zip again and take a smaller "
                    f"step_size, or check the targets."
                )
        return losses

    def _loss(self, task: Task, output: Any, batch: Batch) -> Tensor:
        if self.loss == "labels":
            return task.loss(output, task.targets(batch))
        with torch.no_grad():
            taught = task.run(task.model, batch)
        return distillation_loss(task, output, taught)

    def _record(self, steps: int, optimizer: str, seed: int) -> dict[str, Any]:
        step_size = self.step_size if self.optimizer is None else None
        how = {"loss": self.loss, "step_size": step_size, "optimizer": optimizer, "batch_norm": self.batch_norm}
        return {"retrained": steps, **how, "seed": seed}


def retrain(
    zipped: ZippedModel,
    tasks: Sequence[Task],
    steps: int = 100,
    *,
    loss: Loss = "labels",
    step_size: float = 1e-2,
    optimizer: MakeOptimizer | None = None,
    batch_norm: BatchNorm = "frozen",
    progress: bool = True,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Retrain a joint network lightly, in place, so that all tasks recover together.

    Every step draws one batch per task and steps on the sum of the tasks' losses, weighted by the balance of `zip`. The
    networks run in eval mode: dropout is off, and batch-norm uses its running statistics, which stay as they are
    (`batch_norm="frozen"`; its scale and shift are trained) or follow the batches (`"update"`). Weights that
    are exactly 0 stay 0 in pruned layers, where they are missing connections (Sec. 3.6).

    Args:
        zipped: the joint network.
        tasks: the tasks that it was made from; their data are read again from the start when they end.
        steps: how many.
        loss: "labels" for each task's own loss against its targets; "distill" to have the original networks teach,
            which needs no labels: the divergence from their class probabilities where the task's loss is cross-entropy,
            else the squared error relative to the variance of their answers.
        step_size: relative step of the default optimizer, Adam with a learning rate per tensor of `step_size` times the
            tensor's root mean square, annealed to zero along a cosine. Merged layers differ in scale a hundredfold, and
            one learning rate cannot serve them all.
        optimizer: instead, a function from parameters to any torch optimizer, used without a schedule.
        batch_norm: "frozen" or "update".
        progress: show a progress bar with the losses on standard error.
        seed: of loaders that shuffle with torch's global generator, which is left as it was.

    Returns:
        Per step, the loss of each task.

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


def missing_connections(weights: Iterable[Sequence[nn.Parameter]]) -> list[tuple[nn.Parameter, Tensor]]:
    """Where weights are exactly 0; a layer that is 0 everywhere was made so, not pruned."""
    pruned = {p for weight in weights if any(p.count_nonzero() for p in weight) for p in weight}
    return [(p, p == 0) for p in pruned if p.requires_grad and p.count_nonzero() < p.numel()]


def relative_adam(parameters: Iterable[nn.Parameter], step_size: float) -> torch.optim.Adam:
    """Adam whose step on each tensor is `step_size` times the tensor's root mean square."""
    sizes = [(p, max(float(p.detach().square().mean().sqrt()), SMALLEST_RMS)) for p in parameters]
    return torch.optim.Adam([{"params": [p], "lr": step_size * size} for p, size in sizes])


def distillation_loss(task: Task, output: Any, taught: Any) -> Tensor:
    """How far a network's output is from its teacher's, without labels; averaged over the tensors of the output.

    Raises:
        InputError: an output without floating-point tensors.
    """
    pairs = list(zip(pytree.tree_leaves(output), pytree.tree_leaves(taught), strict=True))
    pairs = [(y, t) for y, t in pairs if isinstance(y, Tensor) and y.is_floating_point() and y.requires_grad]
    if not pairs:
        raise InputError(f"task {task.name!r}: its output has no floating-point tensor to distil.")
    classes = task.loss is F.cross_entropy or isinstance(task.loss, nn.CrossEntropyLoss)
    return torch.stack([_divergence(y, t) if classes else _relative_error(y, t) for y, t in pairs]).mean()


def balance_of(zipped: ZippedModel, task: Task) -> float:
    """The weight of a task's error, as `zip` was told."""
    return float(zipped.history.settings["balance"][list(zipped).index(task.name)])


def _divergence(y: Tensor, taught: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence between class probabilities; logits lie along axis 1."""
    apart = F.kl_div(F.log_softmax(y, 1), F.log_softmax(taught, 1), log_target=True, reduction="none")
    return apart.sum(1).mean()


def _relative_error(y: Tensor, taught: Tensor) -> Tensor:
    return F.mse_loss(y, taught) / taught.var(correction=0).clamp_min(torch.finfo(taught.dtype).tiny)


def _endless(task: Task) -> Iterator[Batch]:
    while True:
        yield from task.batches()


def _losses_bar(progress: bool) -> Progress:
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[losses]}"))
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress)


@contextmanager
def _retraining_mode(zipped: ZippedModel, batch_norm: BatchNorm) -> Iterator[None]:
    with keeping_modes(zipped):
        for module in zipped.modules():
            module.training = batch_norm == "update" and isinstance(module, nn.modules.batchnorm._BatchNorm)
        yield
