"""One network of low rank: its size, its answers, its class, and what stays whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taskzip as tz

DOUBLE = torch.float64


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))


def cnn(**how: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 12, 3, **how), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 3),
    )  # fmt: skip


def vectors(samples: int = 200) -> Tensor:
    return some(samples, 12) @ some(12, 12) / 3 + 0.3


def images(samples: int = 60) -> Tensor:
    return some(samples, 1, 9, 9)


def compress(model: nn.Module, x: Tensor, size: float = 0.6, **options: Any) -> nn.Module:
    return tz.compress(tz.Task("a", model.to(DOUBLE).eval(), list(x.split(50))), size, progress=False, **options)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def far(model: nn.Module, found: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted = model(x)
        return float((found(x) - wanted).square().mean() / wanted.var())


@pytest.mark.parametrize("size", [0.3, 0.5, 0.8, 0.95])
def test_size_and_answers(size: float) -> None:
    model, x = mlp(), vectors()
    found = compress(model, x, size)
    assert size - 0.08 <= count(found) / count(model) <= size
    assert type(found) is type(model) and not found.training
    assert far(model, found, vectors()) < {0.3: 0.6, 0.5: 0.2, 0.8: 0.03, 0.95: 0.01}[size]


def test_layers_are_torchs_own() -> None:
    found = compress(cnn(), images(), 0.5)
    assert {type(m).__module__.split(".")[0] for m in found.modules()} == {"torch"}
    assert any(isinstance(m, nn.Sequential) for m in found)
    torch.export.export(found, (images(2),))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
        {"bias": False},
    ],
)
def test_convolutions_of_any_kind(how: dict[str, Any]) -> None:
    """Of low rank already: nothing is lost, however they slide."""
    torch.manual_seed(2)
    model = cnn(**how).to(DOUBLE)
    with torch.no_grad():
        conv = model[2]
        conv.weight.copy_((some(12, 3) @ some(3, 72)).reshape(conv.weight.shape) / 20)
    whole = count(model)
    lost = conv.weight.numel() - 3 * (72 + 12)
    found = compress(model, images(), (whole - lost + 0.5) / whole)
    assert isinstance(found[2], nn.Sequential) and found[2][1].kernel_size == (1, 1)
    assert far(model, found, images()) < 1e-6


@pytest.mark.parametrize("dims", [1, 3])
def test_in_one_and_three_dimensions(dims: int) -> None:
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    model = nn.Sequential(conv(2, 8, 2), nn.ReLU(), conv(8, 9, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).to(DOUBLE)
    x = some(40, 2, *(4,) * dims)
    model(x)
    found = compress(model, x, 0.7)
    assert count(found) <= 0.7 * count(model)
    assert far(model, found, x) < 0.5


def test_ranks_go_where_they_matter() -> None:
    """Of two branches the outputs hardly look at one."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.out = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(40, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.cat([self.left(x).tanh(), 1e-3 * self.right(x).tanh()], 1))

    found = compress(Branches(), vectors(), 0.7)
    assert isinstance(found.right, nn.Sequential) and found.right[0].out_features == 1
    assert not isinstance(found.left, nn.Sequential) or found.left[0].out_features > 5


def test_the_given_network_is_left_as_it_was() -> None:
    model = cnn().to(DOUBLE).train()
    before = copy.deepcopy(model.state_dict())
    tz.compress(tz.Task("a", model, [images()]), 0.5, progress=False)
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_seed_decides() -> None:
    model, x = mlp(), vectors()
    one, two = (compress(model, x, 0.5, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


class ReadsWeights(nn.Module):
    """Its code reads a layer's dtype, ties two layers, and calls one function with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 20)
        self.tied, self.free, self.out = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 3)
        self.tied.weight = self.third.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu().to(self.second.weight.dtype)
        x = self.third(self.second(x).relu()).relu()
        return self.out(self.free(F.linear(x, self.tied.weight, self.tied.bias).relu()).relu())


def test_what_the_code_of_the_network_reads_stays_whole() -> None:
    model = ReadsWeights()
    found = compress(model, vectors(), 0.8)
    assert [name for name, m in found.named_children() if isinstance(m, nn.Sequential)] in (
        ["first", "free"], ["free"], ["first"], ["first", "free", "out"], ["free", "out"],
    )  # fmt: skip
    assert far(model, found, vectors()) < 0.3


class Asks(nn.Module):
    """What it does depends on what its parts are."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 3)])
        self.free = nn.Linear(3, 30)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x).relu() if (isinstance(part, nn.Linear) and part.in_features < 20) or len(x) < 0 else part(x)
        return self.free(x)


def test_code_that_asks_what_its_parts_are() -> None:
    """Two layers would be no linear layer to it, and lose their activation."""
    model = Asks()
    found = compress(model, vectors(), 0.8)
    assert type(found.parts[0]) is nn.Linear
    assert far(model, found, vectors()) < 0.2


class Masked(nn.Module):
    """Some scores are infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).masked_fill(torch.tensor([False, True, False]), -torch.inf)


def test_infinite_scores() -> None:
    model, x = Masked(), vectors()
    found = compress(model, x, 0.6)
    with torch.no_grad():
        wanted, given = (each(x)[:, ::2] for each in (model, found))
    assert float((given - wanted).square().mean() / wanted.var()) < 0.3


def test_a_layer_that_does_not_matter() -> None:
    """Nothing that it answers reaches the outputs; in float32 a tiny metric would overflow."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.side, self.gate = mlp(), nn.Linear(12, 3), nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.gate * self.side(x)

    model, x = Gated(), vectors().float()
    found = tz.compress(tz.Task("a", model, [x]), 0.6, progress=False)
    assert all(p.isfinite().all() and p.abs().max() < 100 for p in found.parameters())


def test_outputs_without_a_gradient() -> None:
    task = tz.Task("a", mlp().to(DOUBLE), [vectors()], forward=lambda model, x: model(x).argmax(1))
    with pytest.raises(tz.InputError, match=r"task 'a': no output has a gradient, .* pick them by Task\(forward=...\)"):
        tz.compress(task, 0.5, progress=False)


@pytest.mark.parametrize(
    "make, size, message",
    [
        (mlp, 1, "size=1 must be a fraction above 0 and below 1"),
        (mlp, 0.0, "must be a fraction"),
        (mlp, 1.5, "must be a fraction"),
        (
            mlp,
            0.05,
            r"task 'a': size=0.05 cannot be reached: with rank 1 everywhere 126 of its 647 parameters are left",
        ),
    ],
)
def test_sizes_that_cannot_be(make: Callable[[], nn.Module], size: Any, message: str) -> None:
    with pytest.raises(tz.InputError, match=message):
        compress(make(), vectors(), size)


def test_a_model_is_no_task() -> None:
    with pytest.raises(tz.InputError, match=r"compress takes a taskzip.Task, got Sequential"):
        tz.compress(mlp(), 0.5)
