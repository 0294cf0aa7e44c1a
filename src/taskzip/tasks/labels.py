"""What labels say of a network's output: along which axis its classes lie, and the loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskzip.errors import InputError, first_line
from taskzip.tasks.outputs import answers, is_logits, own_loss
from taskzip.tasks.task import Task

_CROSS_ENTROPY = (F.cross_entropy, F.nll_loss), (nn.CrossEntropyLoss, nn.NLLLoss)
_ROUNDING = 1e-2
"""Probabilities may sum to 1 within this, in half precision too."""


def label_loss(task: Task, output: Any, targets: Any) -> Tensor:
    """The task's loss of an output against its targets.

    A loss of the caller's own gets the output as it is. Torch's losses get the one tensor in it that is the answer. By
    default it is the loss that the network has computed by itself, else cross-entropy.

    Raises:
        InputError: targets that the loss cannot use, naming the shapes.
    """
    own = own_loss(output)
    if task.loss is None and own is not None:
        return own
    if task.loss is not None and not _of_torch(task.loss):
        return task.loss(output, targets)
    name, answer = _answer(task, output)
    loss = F.cross_entropy if task.loss is None else task.loss
    if isinstance(targets, Tensor) and is_cross_entropy(task):
        axis = class_axis(answer, targets, name)
        if axis is None and task.loss is None:
            raise InputError(
                f"task {task.name!r}: {_form(targets)} are no class numbers for an output of {_form(answer)}: give the "
                f"task its loss, such as Task(loss=torch.nn.functional.mse_loss)."
            )
        answer = answer if axis is None else answer.movedim(axis, 1)
        targets = targets.movedim(axis, 1) if axis is not None and _real(targets) else targets
        targets = targets if _real(targets) else targets.long()
    if isinstance(targets, Tensor) and _real(targets) and answer.dtype == torch.float32:
        targets = targets.float()
    try:
        return loss(answer, targets)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"task {task.name!r}: its loss fails on an output of {_form(answer)} and targets of {_form(targets)}: "
            f"{first_line(error)}."
        ) from error


def class_axis(output: Tensor, targets: Any, name: str = "") -> int | None:
    """The axis of the output along which its classes lie, as the targets say: class numbers, or probabilities.

    Where both axes fit, it is axis 1, as in torch; the last one in sequences of what is called logits.

    Returns:
        None where the targets are something else.
    """
    if not isinstance(targets, Tensor) or output.dim() < 2 or targets.is_complex() or targets.dtype == torch.bool:
        return None
    last = output.dim() - 1
    for axis in (last, 1) if is_logits(name) and last == 2 else (1, last):
        if output.shape[axis] < 2:
            continue
        if _real(targets) and targets.shape == output.shape and are_probabilities(targets, axis):
            return axis
        if not _real(targets) and targets.shape == output.shape[:axis] + output.shape[axis + 1 :]:
            return axis
    return None


def are_probabilities(x: Tensor, axis: int) -> bool:
    """Whether numbers are probabilities of classes along an axis."""
    return bool((x >= 0).all() and ((x.sum(axis) - 1).abs() <= _ROUNDING).all())


def is_cross_entropy(task: Task) -> bool:
    """Whether the task's loss takes class scores; so it is by default."""
    return task.loss is None or is_one_of(task.loss, *_CROSS_ENTROPY)


def is_one_of(loss: Any, functions: tuple[Any, ...], classes: tuple[type, ...]) -> bool:
    """Whether a loss is one of torch's, be it called with settings of its own."""
    while isinstance(loss, partial):
        loss = loss.func
    return loss in functions if not isinstance(loss, nn.Module) else isinstance(loss, classes)


def _of_torch(loss: Any) -> bool:
    while isinstance(loss, partial):
        loss = loss.func
    made_by = type(loss) if isinstance(loss, nn.Module) else loss
    return str(getattr(made_by, "__module__", "")).startswith("torch.")


def _answer(task: Task, output: Any) -> tuple[str, Tensor]:
    found = answers(output)
    if len(found) != 1:
        raise InputError(
            f"task {task.name!r}: its output, a {type(output).__name__}, has {len(found)} tensors that may be the "
            f"answer ({', '.join(found) or 'none'}): give the task a loss that reads it, Task(loss=...)."
        )
    ((name, answer),) = found.items()
    return name, answer.float() if answer.dtype in (torch.float16, torch.bfloat16) else answer


def _real(x: Tensor) -> bool:
    return x.is_floating_point()


def _form(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
