"""What an original network teaches: class probabilities, answers of yes or no, or values; no labels are needed.

Which of them follows from the task's loss, from what its targets are, and from the output. Where that does not tell,
values are taught, which is right whatever they mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskzip.errors import InputError
from taskzip.tasks import (
    Task,
    answers,
    are_probabilities,
    class_axis,
    is_cross_entropy,
    is_logits,
    is_one_of,
    named_tensors,
)

_BINARY = (
    (F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss),
    (nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss),
)
_CONSTANT = 1e-12
"""A variance below this, relative to the mean square, is rounding."""


@dataclass(frozen=True)
class Lesson:
    """What is taught by one tensor of the output.

    Attributes:
        kind: of numbers.
        axis: along which the classes lie.
        scale: the mean square by which errors of values are divided.
    """

    kind: Literal["classes", "binary", "values"]
    axis: int = 1
    scale: float = 1.0

    def loss(self, y: Tensor, taught: Tensor) -> Tensor:
        """How far an output is from the teacher's, both of any one shape."""
        y, taught = _at_least_float32(y), _at_least_float32(taught)
        if self.kind == "classes":
            return _divergence(F.log_softmax(y, self.axis), F.log_softmax(taught, self.axis)).sum(self.axis).mean()
        if self.kind == "binary":
            return sum(_divergence(F.logsigmoid(s * y), F.logsigmoid(s * taught)) for s in (1, -1)).mean()  # type: ignore[union-attr]
        known = taught.isfinite()
        return (y - taught)[known].abs().square().mean() / self.scale

    def __str__(self) -> str:
        of = {"classes": f"class probabilities along axis {self.axis}", "binary": "answers of yes or no"}
        return of.get(self.kind, "values")


@dataclass(frozen=True)
class Teaching:
    """What one task's original network teaches, by the names of the tensors in its output."""

    task: Task
    lessons: Mapping[str, Lesson]

    def loss(self, output: Any, taught: Any) -> Tensor:
        """How far a network's output is from its teacher's, averaged over the tensors of the output.

        Raises:
            InputError: tensors of other shapes than the teacher's.
        """
        if callable(self.task.teach):
            return self.task.teach(output, taught)
        ys, wanted = dict(named_tensors(output)), dict(named_tensors(taught))
        losses = []
        for name, lesson in self.lessons.items():
            y, t = ys.get(name), wanted.get(name)
            if y is None or t is None or y.shape != t.shape:
                shapes = " and ".join("nothing" if x is None else str(tuple(x.shape)) for x in (y, t))
                raise InputError(
                    f"task {self.task.name!r}: output {name or 'of the joint network'!r} and the original's are "
                    f"{shapes}: outputs to distil must be of one form."
                )
            losses.append(lesson.loss(y, t))
        return torch.stack(losses).mean()

    def __str__(self) -> str:
        if callable(self.task.teach):
            return getattr(self.task.teach, "__name__", type(self.task.teach).__name__)
        return ", ".join(f"{lesson} of {name}" if name else str(lesson) for name, lesson in self.lessons.items())


def teaching(task: Task, examples: Sequence[tuple[Any, Any]]) -> Teaching:
    """Decide what the original teaches.

    Args:
        task: whose `teach` decides, else its loss, else what is seen in the examples.
        examples: outputs of the original network, each with the targets of its batch or None.

    Raises:
        InputError: an output without numbers to distil.
    """
    if callable(task.teach):
        return Teaching(task, {})
    seen = [(answers(output), targets) for output, targets in examples]
    names = [name for name in seen[0][0] if all(name in found for found, _ in seen)]
    names = [name for name in names if any(found[name].numel() for found, _ in seen)]
    if not names:
        raise InputError(
            f"task {task.name!r}: its output, a {type(examples[0][0]).__name__}, "
            f"has no floating-point tensor to distil."
        )
    return Teaching(task, {name: _lesson(task, name, names, seen) for name in names})


def distillation_loss(task: Task, output: Any, taught: Any) -> Tensor:
    """How far a network's output is from its teacher's, as this one output says; averaged over the tensors in it.

    Raises:
        InputError: an output without floating-point tensors.
    """
    return teaching(task, [(taught, None)]).loss(output, taught)


def _lesson(task: Task, name: str, names: Sequence[str], seen: Sequence[tuple[dict[str, Tensor], Any]]) -> Lesson:
    taught = [found[name] for found, _ in seen if found[name].numel()]
    if isinstance(task.teach, int):
        if not -taught[0].dim() <= task.teach < taught[0].dim():
            raise InputError(
                f"task {task.name!r}: teach={task.teach} is no axis of an output of shape {tuple(taught[0].shape)}."
            )
        return Lesson("classes", task.teach % taught[0].dim())
    real = not taught[0].is_complex()
    if real and (task.teach == "binary" or (task.teach == "auto" and is_one_of(task.loss, *_BINARY))):
        return Lesson("binary")
    if real and task.teach == "auto" and is_cross_entropy(task):
        targets = [_targets_of(name, names, each) for found, each in seen if found[name].numel()]
        axis = _class_axis(task, name, taught, targets, alone=len(names) == 1)
        if axis is not None and not all(are_probabilities(t, axis) for t in taught):
            return Lesson("classes", axis)
    return Lesson("values", scale=_spread(taught))


def _targets_of(name: str, names: Sequence[str], targets: Any) -> Any:
    """The part of a batch's targets that belongs to an output: of its name, or in its place among as many."""
    parts = dict(named_tensors(targets))
    if len(names) == 1 and len(parts) == 1:
        return next(iter(parts.values()))
    if name in parts:
        return parts[name]
    return list(parts.values())[names.index(name)] if len(parts) == len(names) else None


def _class_axis(task: Task, name: str, taught: Sequence[Tensor], targets: Sequence[Any], *, alone: bool) -> int | None:
    """Along which axis the classes lie; None where it is not sure that there are any."""
    first, axes = taught[0], {class_axis(t, y, name) for t, y in zip(taught, targets, strict=True)}
    axis = axes.pop() if len(axes) == 1 else None
    if axis is not None:
        numbers = [y for y in targets if not y.is_floating_point() and y.numel()]
        return axis if all(int(y.max()) < first.shape[axis] for y in numbers) else None
    if is_logits(name) and all(y is None for y in targets):
        axis = 1 if first.dim() > 3 else first.dim() - 1
    elif task.loss is not None and alone:
        axis = 1
    return axis if axis and axis < first.dim() and first.shape[axis] > 1 else None


def _spread(taught: Iterable[Tensor]) -> float:
    """The variance of what is taught; its mean square where it is constant, and 1 where it is 0."""
    values = torch.cat([t.detach().flatten()[t.detach().flatten().isfinite()] for t in taught])
    values = values.to(torch.complex128 if values.is_complex() else torch.float64)
    if not len(values):
        return 1.0
    square, variance = float(values.abs().square().mean()), float((values - values.mean()).abs().square().mean())
    return (variance if variance > _CONSTANT * square else square) or 1.0


def _divergence(y: Tensor, taught: Tensor) -> Tensor:
    """Terms of the Kullback-Leibler divergence between log-probabilities; what is impossible adds nothing."""
    return (taught.exp() * (taught - y)).masked_fill(taught.isneginf(), 0)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
