"""What the tasks read: one input for all of them or one for each, and what its tensors are called."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from taskzip.errors import InputError
from taskzip.tasks import Call, as_call, by_task

Sizes = Mapping[str, Mapping[int, int]]
"""By the name of a tensor and the axis."""


class Example:
    """An example of what the tasks read, on the given device, in the usual order of memory.

    Attributes:
        given: what each task reads, or all of them under "".
        tensors: by name: "input", "input.0" of a tuple, or the keyword; with one input for each task "input.task",
            "input.task.0" and "input.task.keyword"; and so on for tensors inside of an argument.
        batches: the name of the first axis of those tensors in which it is the batch.
        samples: of the largest batch; 0 where there are none.

    Raises:
        InputError: inputs for some of the tasks only, without a tensor or a sample, or with arrays.
    """

    def __init__(self, example: Any, tasks: Sequence[str], device: torch.device) -> None:
        self._tasks, self._device = tasks, device
        self.given = by_task(example, tasks)
        self._names: dict[str, list[str]] = {}
        self.tensors: dict[str, Tensor] = {}
        self.batches: dict[str, str] = {}
        self.samples = 0
        for task, each in self.given.items():
            given = {name: value for name, value in _named(each, task) if isinstance(value, Tensor)}
            usual = torch.contiguous_format  # also of one channel, where others may count as contiguous too
            tensors = {name: value.to(device).clone(memory_format=usual) for name, value in given.items()}
            if not tensors:
                whose = f" for task {task!r}" if task else ""
                raise InputError(f"example{whose} is a {type(each).__name__} without a tensor to read.")
            self._names[task] = list(tensors)
            self.tensors |= tensors
            samples = next((len(t) for t in tensors.values() if t.dim()), None)
            if samples == 0:
                raise InputError(f"example is empty: {next(iter(tensors))} has no sample.")
            self.samples = max(self.samples, samples or 0)
            batch = f"batch_{task.replace('-', '_')}" if task else "batch"
            while batch in self.batches.values():  # of a task called nearly the same
                batch += "_"
            self.batches |= {name: batch for name, t in tensors.items() if t.dim() and len(t) == samples}

    def calls(self, tensors: Mapping[str, Tensor]) -> dict[str, Call]:
        """How each task is called, with these tensors in place of the example's.

        Each gets copies, so that one that writes into its input does not write into that of another one.
        """
        found: dict[str, Call] = {}
        for task in self._tasks:
            whose = task if task in self.given else ""
            names = [name for name, _ in _named(self.given[whose], whose)]
            leaves, form = pytree.tree_flatten(self.given[whose])
            values = [tensors[n].clone() if n in tensors else leaf for n, leaf in zip(names, leaves, strict=True)]
            found[task] = as_call(pytree.tree_unflatten(values, form))
        return found

    def only(self, task: str) -> Example:
        """The example of one task by itself."""
        alone = self.given[""] if "" in self.given else {task: self.given[task]}
        return Example(alone, [task], self._device)

    def read_by(self, tasks: Collection[str]) -> list[str]:
        """The names of the tensors that these tasks read."""
        read = {name for task in tasks for name in self._names.get(task) or self._names[""]}
        return [name for name in self.tensors if name in read]

    def names(self, task: str) -> list[str]:
        """Of the tensors that are given for a task, or for all under ""."""
        return self._names[task]

    def resized(self, sizes: int | Sizes) -> dict[str, Tensor]:
        """The tensors, of other sizes along some axes: what is there, over and over again.

        Args:
            sizes: of axes, or how many samples are in the batch.
        """
        if isinstance(sizes, int):
            sizes = {name: {0: sizes} for name in self.batches}
        found = dict(self.tensors)
        for name, axes in sizes.items():
            for axis, size in axes.items():
                chosen = torch.arange(size, device=found[name].device) % found[name].shape[axis]
                found[name] = found[name].index_select(axis, chosen)
        return found


def _named(example: Any, task: str) -> Iterator[tuple[str, Any]]:
    """Every value in the arguments, and its name."""
    start = ["input", task] if task else [] if isinstance(example, dict) else ["input"]
    found: set[str] = set()
    for path, value in pytree.tree_flatten_with_path(example)[0]:
        name = ".".join([*start, *(str(_key(key)) for key in path)])
        if name in found:
            raise InputError(f"example: {name} would be the name of two tensors: rename a key.")
        found.add(name)
        if isinstance(value, np.ndarray):
            raise InputError(f"example: {name} is an array of NumPy, which networks do not read: give a tensor.")
        yield name, value


def parts(value: Any) -> dict[Any, Any]:
    """What is directly inside of a list, a dict or a named tuple; nothing in other values."""
    found = pytree.tree_flatten_with_path(value, is_leaf=lambda each: each is not value)[0]
    return {_key(path[0]): part for path, part in found if path}


def _key(key: Any) -> Any:
    """Of a list, a dict or a named tuple."""
    return next(getattr(key, each) for each in ("idx", "key", "name") if hasattr(key, each))
