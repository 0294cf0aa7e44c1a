"""`measure`: what a joint network is worth on held-out data, beside the networks that it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from taskzip.errors import InputError
from taskzip.planning.held_out import judges
from taskzip.planning.plan import MaxDrop, Metric
from taskzip.randomness import seeded
from taskzip.tasks import Task
from taskzip.zipped import ZippedModel


def measure(
    zipped: ZippedModel,
    tasks: Sequence[Task],
    data: Mapping[str, Iterable[Any]],
    *,
    metric: Metric | Mapping[str, Metric] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure every task, as its own network and in the joint one, and write that into the joint network's history.

    The summary, the checkpoint and the model card of `save_pretrained` then say it.

    Args:
        zipped: the joint network.
        tasks: the tasks that it was made from, with the original networks.
        data: by task name, batches with targets that were not used for zipping.
        metric: as in `MaxDrop`: `metric(output, targets)`, higher is better, for all tasks or by task name; default
            `Task.metric`, else accuracy in percent where the task's loss is cross-entropy.

    Returns:
        By task name: the name of the "metric", its value "before" and "after", and how many "samples" it is a mean of.

    Raises:
        InputError: other tasks than those zipped, or data or a metric that cannot be used.
    """
    names = [task.name for task in tasks]
    if sorted(names) != sorted(zipped):
        raise InputError(
            f"the joint network has the tasks {', '.join(zipped)}, but {', '.join(names) or 'none'} were given."
        )
    wanted = MaxDrop(0.0, data, metric)
    with seeded(0):
        found = {
            name: {
                "metric": _name(wanted.metric_of(name) or task.metric),
                "before": judge.original.mean,
                "after": judge.measure(zipped[name]).mean,
                "samples": judge.samples,
            }
            for task, (name, judge) in zip(tasks, judges(tasks, wanted).items(), strict=True)
        }
    zipped.history.later.append({"measured": found})
    return found


def _name(metric: Metric | None) -> str:
    return "accuracy in percent" if metric is None else getattr(metric, "__name__", type(metric).__name__)
