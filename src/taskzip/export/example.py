"""What the tasks read: one input for all of them or one for each, and what its tensors are called."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taskzip.errors import InputError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


class Example:
    """An example of what the tasks read, on the given device.

    Attributes:
        tensors: by name: "input", "input.0" of a tuple, or the keyword; with one input for each task "input.task",
            "input.task.0" and "input.task.keyword".
        batches: the name of the first axis of those tensors in which it is the batch.

    Raises:
        InputError: inputs for some of the tasks only, or without a tensor or a sample.
    """

    def __init__(self, example: Any, tasks: Sequence[str], device: torch.device) -> None:
        self._tasks, self._device = tasks, device
        self._examples = _by_task(example, tasks)
        self.tensors: dict[str, Tensor] = {}
        self.batches: dict[str, str] = {}
        for task, each in self._examples.items():
            tensors = {name: value.to(device) for name, value in _named(each, task) if isinstance(value, Tensor)}
            if not tensors:
                whose = f" for task {task!r}" if task else ""
                raise InputError(f"example{whose} is a {type(each).__name__} without a tensor to read.")
            self.tensors |= tensors
            samples = next((len(t) for t in tensors.values() if t.dim()), None)
            if samples == 0:
                raise InputError(f"example is empty: {next(iter(tensors))} has no sample.")
            batch = f"batch_{task.replace('-', '_')}" if task else "batch"
            while batch in self.batches.values():  # of a task called nearly the same
                batch += "_"
            self.batches |= {name: batch for name, t in tensors.items() if t.dim() and len(t) == samples}

    def calls(self, tensors: Mapping[str, Tensor]) -> dict[str, Call]:
        """How each task is called, with these tensors in place of the example's."""
        found: dict[str, Call] = {}
        for task, each in self._examples.items():
            values = tuple(tensors.get(name, value) for name, value in _named(each, task))
            found[task] = ((), dict(zip(each, values, strict=True))) if isinstance(each, Mapping) else (values, {})
        return {task: found.get(task) or found[""] for task in self._tasks}

    def only(self, task: str) -> Example:
        """The example of one task by itself."""
        alone = self._examples[""] if "" in self._examples else {task: self._examples[task]}
        return Example(alone, [task], self._device)

    def read_by(self, tasks: Collection[str]) -> list[str]:
        """The names of the tensors that these tasks read."""
        return [name for name in self.tensors if any(name in self.only(task).tensors for task in tasks)]

    def resized(self, samples: int) -> dict[str, Tensor]:
        """The tensors, with so many samples in the batch: those of the example over and over again."""
        found = {}
        for name, tensor in self.tensors.items():
            chosen = torch.arange(samples, device=tensor.device) % len(tensor) if name in self.batches else None
            found[name] = tensor if chosen is None else tensor[chosen]
        return found

    def repeated(self, times: int) -> dict[str, Tensor]:
        """The tensors, with every sample of the batch so many times."""
        return {name: torch.cat([t] * times) if name in self.batches else t for name, t in self.tensors.items()}


def _by_task(example: Any, tasks: Sequence[str]) -> dict[str, Any]:
    """The example of each task, or of all under "": a dict whose keys are task names is by task."""
    if not isinstance(example, Mapping) or not set(example) & set(tasks):
        return {"": example}
    if set(example) != set(tasks):
        raise InputError(
            f"example has inputs for {', '.join(map(str, example))}, but the tasks are {', '.join(tasks)}: give one "
            f"input for each task, or one for all of them."
        )
    return {task: example[task] for task in tasks}


def _named(example: Any, task: str) -> Iterator[tuple[str, Any]]:
    """Every argument and its name."""
    start = f"input.{task}" if task else "input"
    if isinstance(example, Mapping):
        yield from ((f"{start}.{key}" if task else str(key), value) for key, value in example.items())
    elif isinstance(example, (tuple, list)):
        yield from ((f"{start}.{i}", value) for i, value in enumerate(example))
    else:
        yield start, example
