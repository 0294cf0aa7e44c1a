"""The self-check of every zip: a network whose units were misread is refused, with the layer's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskzip as tz
from taskzip.graph import _rules


class Summed(nn.Module):
    """Its middle units are not alike: each is added to all that follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.out = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.middle(self.first(x).relu()).cumsum(1))


def tasks() -> list[tz.Task]:
    return [tz.Task(name, Summed(), [torch.randn(20, 4)]) for name in "ab"]


def test_what_the_rules_know_is_zipped() -> None:
    records = tz.zip(tasks(), share=1.0, progress=False).history.layers
    assert [record.shared for record in records] == [6, 0, 0]
    assert records[1].note.startswith("a: ")


def test_a_wrong_rule_is_found_before_anything_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    def harmless(c: Any, node: Any, a: Any) -> Any:
        return c.axes(a["self"])

    monkeypatch.setitem(_rules.RULES, "cumsum", harmless)
    models = tasks()
    before = [{k: v.clone() for k, v in task.model.state_dict().items()} for task in models]
    with pytest.raises(tz.GraphError, match="task 'a': re-ordering the units of 'middle' changes the outputs"):
        tz.zip(models, share=1.0, progress=False)
    for task, state in zip(models, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in task.model.state_dict().items())


def test_a_parameter_without_a_shape_is_refused() -> None:
    lazy = [tz.Task(name, nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), [torch.randn(5, 4)]) for name in "ab"]
    with pytest.raises(tz.InputError, match=r"no shape yet: run the network once|all parameters"):
        tz.zip(lazy, share=1.0, progress=False)


class Sampled(nn.Module):
    """Noise in the middle, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.out(h + torch.randn_like(h))


class Dropped(Sampled):
    """Dropout that is always on."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(nn.functional.dropout(self.first(x).relu(), 0.3))


class Counting(Sampled):
    """It adds up how often it was called."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.out(self.first(x).relu()) * self.calls


@pytest.mark.parametrize("kind", [Sampled, Dropped, Counting])
@pytest.mark.parametrize("norms", ["private", "fold"])
def test_a_network_that_answers_anew_each_time_is_not_called_misread(kind: type[nn.Module], norms: Any) -> None:
    tasks = [tz.Task(name, kind().eval(), [torch.randn(20, 4)]) for name in "ab"]
    with pytest.raises(tz.InputError, match="task 'a': the network gives other outputs when it runs twice"):
        tz.zip(tasks, share=0.5, batch_norm=norms, progress=False)
