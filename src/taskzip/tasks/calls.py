"""How networks are called with an example: one for all tasks, or a dict with one for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from taskzip.errors import InputError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def by_task(example: Any, tasks: Sequence[str], what: str = "example") -> dict[str, Any]:
    """The example of each task, or of all under "": a dict with the name of a task among its keys is by task.

    Raises:
        InputError: a dict by task that leaves out tasks; `what` says how the caller gave it.
    """
    if not isinstance(example, Mapping) or not set(example) & set(tasks):
        return {"": _plain(example)}
    if not set(example) >= set(tasks):
        raise InputError(
            f"{what} has inputs for {', '.join(map(str, example))}, but the tasks are {', '.join(tasks)}: give one "
            f"input for each task, or one for all of them."
        )
    return {task: _plain(example[task]) for task in tasks}


def as_call(example: Any) -> Call:
    """A dict is keyword arguments, a tuple or list positional ones, and anything else the only argument."""
    if isinstance(example, dict):
        return (), example
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


def _plain(example: Any) -> Any:
    """A dict for what only behaves like one."""
    return dict(example) if isinstance(example, Mapping) else example
