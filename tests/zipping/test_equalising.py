"""How large a network's activations happen to be does not matter: the same functions give the same joint network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import taskzip as tz
from taskzip.graph import Structure


class Residual(nn.Module):
    """A stream with batch-norm inside of its block, and one of the bottleneck's layers without."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.norm, self.out = nn.BatchNorm2d(8), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.out((x + self.down(self.norm(self.up(x)).relu())).relu().mean((2, 3)))


def mlp(classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 8), nn.LeakyReLU(), nn.Linear(8, classes))


def cnn(classes: int) -> nn.Module:
    first, second = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 7, 3, padding=1)
    return nn.Sequential(
        first, nn.BatchNorm2d(6), nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(28, classes)
    )


def smooth(classes: int) -> nn.Module:
    """Whose hidden units have a scale of their own."""
    return nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, classes))


def made(make: Callable[[int], nn.Module]) -> tuple[list[nn.Module], list[list[Tensor]]]:
    torch.manual_seed(0)
    shape = (1, 6, 6) if make in (cnn, Residual) else (5,)
    models = [make(classes).double() for classes in (3, 4)]
    data = [[torch.randn(40, *shape, dtype=torch.float64) + 0.3 for _ in range(3)] for _ in models]
    for model, batches in zip(models, data, strict=True):
        model.train()(batches[0])
    return [model.eval() for model in models], data


def answers(
    models: Sequence[nn.Module], data: Sequence[Sequence[Tensor]], share: float, **options: Any
) -> list[Tensor]:
    tasks = [tz.Task(name, model, each) for name, model, each in zip("ab", models, data, strict=True)]
    zipped = tz.zip(tasks, share=share, progress=False, **options)
    with torch.no_grad():
        return [zipped[name](each[0]) for name, each in zip("ab", data, strict=True)]


def assert_same(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("make", [mlp, cnn, Residual])
def test_rescaled_networks(make: Callable[[int], nn.Module], share: float) -> None:
    models, data = made(make)
    rescaled, rng = copy.deepcopy(models[0]), np.random.default_rng(0)
    structure = tz.inspect(rescaled, data[0][0])
    for space, free in enumerate(structure.scales.free):
        assert free
        structure.rescale(rescaled, {space: 10 * np.exp(rng.normal(size=len(structure.spaces[space].units)))})
    assert_same(answers([rescaled, models[1]], data, share), answers(models, data, share))


@pytest.mark.parametrize("make", [mlp, smooth])
def test_rescaled_inputs(make: Callable[[int], nn.Module]) -> None:
    """Each by itself; damping is relative to the mean of all inputs, and left out here."""
    models, data = made(make)
    wanted = answers(models, data, 0.75, damping=0.0)
    scale = torch.tensor([0.1, 1.0, 30.0, 7.0, 0.5], dtype=torch.float64)
    for model in models:
        model[0].weight.data /= scale
    assert_same(answers(models, [[x * scale for x in each] for each in data], 0.75, damping=0.0), wanted)


@pytest.mark.parametrize("make", [mlp, smooth])
def test_rescaled_outputs(make: Callable[[int], nn.Module]) -> None:
    models, data = made(make)
    wanted = answers(models, data, 0.75)
    for parameter in models[0][-1].parameters():
        parameter.data *= 50
    given = answers(models, data, 0.75)
    assert_same([given[0] / 50, given[1]], wanted)


def test_the_papers_procedure_takes_networks_as_they_are() -> None:
    models, data = made(mlp)
    tasks = [tz.Task(name, model, each) for name, model, each in zip("ab", models, data, strict=True)]
    zipped = tz.zip(tasks, share=0.0, matching="greedy", compensate=False, progress=False)
    for name, model in zip("ab", models, strict=True):
        for one, other in zip(zipped[name].parameters(), model.parameters(), strict=True):
            assert torch.equal(one, other)


def test_dead_units_and_units_that_nothing_reads_stay_finite() -> None:
    models, data = made(mlp)
    with torch.no_grad():
        models[0][0].weight[0], models[0][0].bias[0] = 0, -1
        models[0][2].weight[:, 1] = 0
        models[1][0].bias -= 100  # all of them
    assert all(each.isfinite().all() for each in answers(models, data, 0.5))


def test_a_reader_that_was_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    models, data = made(cnn)
    factors = Structure.factors

    def without_readers(self: Structure, *given: Any) -> dict[str, Any]:
        return {name: (each[0], *(None for _ in each[1:])) for name, each in factors(self, *given).items()}

    monkeypatch.setattr(Structure, "factors", without_readers)
    with pytest.raises(tz.GraphError, match=r"task 'a': scaling the units of '0' changes the outputs"):
        answers(models, data, 0.5)
    answers(models, data, 0.5, compensate="output")


def test_equal_networks_stay_equal_on_different_data() -> None:
    (model, _), data = made(cnn)
    given = answers([model, copy.deepcopy(model)], [data[0], [3 * x - 1 for x in data[1]]], 1.0)
    with torch.no_grad():
        assert_same(given, [model(data[0][0]), model(3 * data[1][0] - 1)])


def test_units_are_as_large_as_before_and_shared_ones_as_the_geometric_mean() -> None:
    (model, _), data = made(mlp)
    other = copy.deepcopy(model)
    larger = torch.tensor([4.0 ** (k % 3 - 1) for k in range(9)], dtype=torch.float64)
    with torch.no_grad():
        other[0].weight *= larger[:, None]
        other[0].bias *= larger
        other[2].weight /= larger
    tasks = [tz.Task(name, net, data[0]) for name, net in zip("ab", (model, other), strict=True)]
    zipped = tz.zip(tasks, share={"0": 4}, progress=False)
    wanted = torch.cat([model[0].weight, other[0].weight, model[0].weight * larger.sqrt()[:, None]])
    for name in "ab":
        weight = zipped.materialize(name)[0].weight
        assert (torch.cdist(weight, wanted).min(1).values < 1e-6 * weight.norm(dim=1)).all()
