"""What errors of answers do to outputs, in the mean over random sums of these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taskzip.graph import analyse
from taskzip.observing.sensitivity import Sensitivity, sensitivities
from taskzip.tasks import Task

DOUBLE = torch.float64


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def found(model: nn.Module, data: list[Any], **options: Any) -> dict[str, Sensitivity]:
    task = Task("a", model.to(DOUBLE), data, **options)
    return sensitivities(task, task.model, analyse(task.model, data[0], task.run).layers, 0)


def test_of_a_linear_network() -> None:
    """y = B z: the change of y, squared, over its variance and number is dz^T B^T B dz over these."""
    first, second = nn.Linear(4, 6), nn.Linear(6, 5)
    model, data = nn.Sequential(first, second), [some(4000, 4)]
    metrics = found(model, data)
    weight, variance = second.weight.detach(), model(data[0]).detach().var(correction=0)
    wanted = weight.mT @ weight / (variance * 5)
    # 512 samples and more are one batch here: the mean over 4,000 random sums
    assert (metrics["0"].metric - wanted).norm() < 0.1 * wanted.norm()
    wanted = torch.eye(5, dtype=DOUBLE) / (variance * 5)
    assert (metrics["1"].metric - wanted).norm() < 0.1 * wanted.norm()
    assert metrics["0"].rows == metrics["1"].rows == 1


class Places(nn.Module):
    """Convolutions, an activation in place, a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 1)
        self.act, self.out = nn.ReLU(inplace=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return self.out(self.twice(self.act(self.twice(x))).mean((2, 3)))


def test_rows_are_places_and_calls() -> None:
    metrics = found(Places(), [some(7, 1, 6, 6), some(3, 1, 6, 6)])
    assert {name: each.rows for name, each in metrics.items()} == {"first": 16, "twice": 32, "out": 1}
    assert all(torch.linalg.eigvalsh(each.metric).min() > -1e-12 for each in metrics.values())


def test_it_foretells_what_small_errors_do() -> None:
    """First order: the mean change of the outputs under random errors of one layer."""
    torch.manual_seed(1)
    model, x = Places().to(DOUBLE), some(400, 1, 6, 6)
    metric, rows = found(model, [x])["first"]
    size, changes = 1e-4, []
    root = some(3, 3)
    answers = model(x).detach()
    for _ in range(30):
        hook = model.first.register_forward_hook(
            lambda _m, _i, z: z + size * torch.einsum("ij,bjhw->bihw", root, some(*z.shape))
        )
        changes.append(float((model(x).detach() - answers).square().mean() / answers.var(correction=0)))
        hook.remove()
    foretold = float(torch.trace(metric @ root @ root.mT)) * size**2 * rows
    assert sum(changes) / len(changes) == pytest.approx(foretold, rel=0.15)


def test_nothing_is_left_behind() -> None:
    model = Places().train()
    model.first.weight.requires_grad_(False)
    found(model, [some(4, 1, 6, 6)])
    assert all(p.grad is None for p in model.parameters()) and all(m.training for m in model.modules())
    assert torch.is_grad_enabled() and not model.first.weight.requires_grad
    with torch.no_grad():
        assert set(found(model, [some(4, 1, 6, 6)])) == {"first", "twice", "out"}


def test_networks_whose_parameters_are_frozen() -> None:
    model = Places().requires_grad_(False)
    assert set(found(model, [some(4, 1, 6, 6)])) == {"first", "twice", "out"}


def test_a_layer_behind_which_nothing_comes_out() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.first(x).relu()).argmax(1)

    assert found(Chooses(), [some(4, 4)]) == {}


def test_a_single_number_as_output() -> None:
    metrics = found(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), [some(1, 4), some(1, 4)])
    assert all(each.metric.isfinite().all() and each.metric.any() for each in metrics.values())
