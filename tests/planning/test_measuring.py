"""What `measure` finds, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import taskzip as tz


def task(name: str, **how: object) -> tz.Task:
    torch.manual_seed(len(name))
    return tz.Task(name, nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), [torch.randn(20, 4)], **how)


def held_out() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(10, 4), torch.randint(3, (10,))), (torch.randn(5, 4), torch.randint(3, (5,)))]


def accuracy(network: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    right = sum(int((network(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / sum(len(y) for _, y in batches)


def test_both_networks_are_measured_and_the_history_keeps_it():
    tasks, data = [task("a"), task("bb")], {"a": held_out(), "bb": held_out()}
    zipped = tz.zip(tasks, share=1.0, progress=False)
    state = torch.random.get_rng_state()
    found = tz.measure(zipped, tasks[::-1], data)
    assert torch.equal(torch.random.get_rng_state(), state)
    for each in tasks:
        assert found[each.name] == {
            "metric": "accuracy in percent",
            "before": pytest.approx(accuracy(each.model, data[each.name])),
            "after": pytest.approx(accuracy(zipped[each.name], data[each.name])),
            "samples": 15,
        }
    assert zipped.history.later == [{"measured": found}]


def test_metrics_go_by_their_names():
    def agreement(output: torch.Tensor, targets: torch.Tensor) -> float:
        return float((output.argmax(1) == targets).double().mean())

    tasks = [task("a", metric=agreement), task("bb", loss=nn.functional.mse_loss)]
    zipped, data = tz.zip(tasks, share=1.0, progress=False), {"a": held_out(), "bb": held_out()}
    with pytest.raises(tz.InputError, match="task 'bb': its loss is not cross-entropy"):
        tz.measure(zipped, tasks, data)
    assert zipped.history.later == []
    found = tz.measure(zipped, tasks, data, metric={"bb": lambda y, t: y.mean()})
    assert (found["a"]["metric"], found["bb"]["metric"]) == ("agreement", "<lambda>")


def test_other_tasks_and_missing_data():
    tasks = [task("a"), task("bb")]
    zipped = tz.zip(tasks, share=1.0, progress=False)
    with pytest.raises(tz.InputError, match="has the tasks a, bb, but a were given"):
        tz.measure(zipped, tasks[:1], {"a": held_out()})
    with pytest.raises(tz.InputError, match="no held-out data for task 'bb'"):
        tz.measure(zipped, tasks, {"a": held_out()})
