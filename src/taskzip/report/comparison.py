"""`inspect` of several tasks: which of their layers belong together, before anything is zipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from taskzip.errors import InputError
from taskzip.graph import Structure, analyse
from taskzip.tasks import Task, evaluating
from taskzip.zipping import JointLayers, Layers, correspond


@dataclass(frozen=True)
class Comparison:
    """Which layers of several tasks `zip` puts together. Print it.

    Attributes:
        tasks: their names.
        networks: per task, its structure.
        layers: the joint layers in the order in which they are zipped: per task that has it, by number, its layer.
    """

    tasks: tuple[str, ...]
    networks: tuple[Structure, ...]
    layers: tuple[JointLayers, ...]

    def __str__(self) -> str:
        rows = [self.tasks]
        for layer in self.layers:
            rows.append(tuple(layer[t].name if t in layer else "-" for t in range(len(self.tasks))))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def compare(tasks: Sequence[Task], layers: Layers | None = None) -> Comparison:
    """Read the networks of tasks, and put their layers in correspondence as `zip(tasks, layers=layers)` does.

    Raises:
        InputError: what is no list of tasks.
        GraphError: a network that torch.export cannot follow.
    """
    if not isinstance(tasks, Sequence) or not all(isinstance(task, Task) for task in tasks):
        raise InputError("inspect takes a network and an example input, or a list of taskzip.Task objects.")
    networks = []
    for task in tasks:
        with evaluating(task.model):
            networks.append(analyse(task.model, next(task.batches()), task.run))
    names = tuple(task.name for task in tasks)
    return Comparison(names, tuple(networks), tuple(correspond(names, networks, layers)))
