"""What is held out, and that retraining never ends worse than it started."""

from __future__ import annotations

import copy
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import taskzip as tz
from taskzip.training.masters import Masters
from taskzip.training.watching import Held, Watch, looks


def net(seed: int, outputs: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, outputs)).eval()


def task(data: Any, seed: int = 0) -> tz.Task:
    return tz.Task("ab"[seed], net(seed), data)


@pytest.mark.parametrize("n, held", [(1, [0]), (2, [1]), (3, [1]), (4, [2]), (16, [4, 12]), (100, [])])
def test_what_is_held_out_is_spread_over_all_and_not_trained_on(n: int, held: list[int]) -> None:
    data = list(torch.randn(n, 4, 6))
    found = Held(task(data), steps=100)
    numbers = [next(i for i, x in enumerate(data) if torch.equal(x, batch)) for batch in found.batches]
    if n == 100:
        assert len(numbers) == 8 and min(numbers) < 20 and max(numbers) > 80
    else:
        assert numbers == held
    seen = list(islice(found.others(), 2 * n))
    assert n == 1 or not any(torch.equal(x, data[i]) for x in seen for i in numbers)
    assert len(seen) == 2 * n


def test_few_steps_hold_out_little_and_shuffled_batches_are_all_seen() -> None:
    assert len(Held(task(list(torch.randn(100, 4, 6))), steps=3).batches) == 1
    loader = DataLoader(TensorDataset(torch.randn(64, 6), torch.zeros(64).long()), 8, shuffle=True)
    held = Held(task(loader), steps=10)
    assert len(list(islice(held.others(), 8))) == 8


def test_the_best_state_is_kept() -> None:
    state, losses = torch.zeros(2), iter([3.0, 4.0, 1.0, float("nan"), 2.0])
    watch = Watch(lambda: next(losses), [state])
    for step in range(1, 5):
        state += 1
        watch.look(step)
    watch.restore()
    assert (watch.start, watch.best, watch.step) == (3.0, 1.0, 2) and state.tolist() == [2.0, 2.0]
    assert looks(3) == {3} and max(looks(100)) == 100 and len(looks(100)) <= 6


def rows(seed: int, n: int = 8) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(x, x[:, :3].argmax(1)) for x in torch.randn(n, 16, 6, generator=g)]


@pytest.mark.parametrize("loss", ["labels", "distill"])
@pytest.mark.parametrize("how", [{}, {"step_size": 1.0}, {"optimizer": lambda p: torch.optim.SGD(p, lr=3.0)}])
def test_no_end_is_worse_than_the_start(loss: Any, how: dict[str, Any]) -> None:
    """Not even that of a good start, here that of a network zipped with itself, and steps that do nothing but harm."""
    data = rows(0)
    model = net(0)
    tasks = [tz.Task(name, copy.deepcopy(model), data) for name in "ab"]
    zipped = tz.zip(tasks, share=1.0, progress=False)
    before = {name: tensor.clone() for name, tensor in zipped.state_dict().items()}
    losses = tz.retrain(zipped, tasks, steps=12, loss=loss, progress=False, **how)
    assert len(losses) == 12
    held_out = zipped.history.later[-1]["held_out_loss"]
    assert held_out["after"] <= held_out["before"]
    if held_out["step"] == 0:
        assert all(torch.equal(tensor, before[name]) for name, tensor in zipped.state_dict().items())
    else:
        assert held_out["after"] < held_out["before"]


def test_the_step_is_lowered_where_it_does_harm() -> None:
    data = rows(0)
    good = [tz.Task(name, copy.deepcopy(net(0)), data) for name in "ab"]
    sizes = []
    for noise in (0.0, 0.3):
        zipped = tz.zip(good, share=1.0, progress=False)
        with torch.no_grad():
            for parameter in zipped.parameters():
                parameter += noise * torch.randn_like(parameter)
        tz.retrain(zipped, good, steps=24, loss="distill", progress=False)
        sizes.append(zipped.history.later[-1]["step_size"])
    assert sizes == [1e-3, 1e-2]


def disturb(zipped: tz.ZippedModel) -> None:
    """So that there is something to learn."""
    with torch.no_grad():
        for parameter in zipped.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("loss", ["labels", "distill"])
def test_other_precisions_learn_and_stay_what_they_are(dtype: torch.dtype, loss: Any) -> None:
    tasks = [
        tz.Task(name, net(seed).to(dtype), [(x.to(dtype), y) for x, y in rows(seed)]) for seed, name in enumerate("ab")
    ]
    zipped = tz.zip(tasks, share=1.0, progress=False)
    assert {p.dtype for p in zipped.parameters()} == {dtype}
    disturb(zipped)
    tz.retrain(zipped, tasks, steps=40, loss=loss, progress=False)
    held_out = zipped.history.later[-1]["held_out_loss"]
    assert held_out["after"] < (0.97 if loss == "labels" else 0.9) * held_out["before"]
    assert {p.dtype for p in zipped.parameters()} == {dtype}
    assert all(p.isfinite().all() for p in zipped.parameters())


def test_gradients_too_large_for_float16_lower_the_scale() -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.float16))
    masters = Masters([parameter])
    scale = masters.scale
    parameter.grad = torch.tensor([torch.inf, 0.0], dtype=torch.float16)
    assert not masters.take_gradients() and masters.scale == scale / 2
    parameter.grad = torch.tensor([scale, 0.0], dtype=torch.float16)
    assert masters.take_gradients()
    assert masters.parameters[0].grad.tolist() == [2.0, 0.0] and masters.parameters[0].dtype == torch.float32


def test_small_steps_add_up_in_half_precision() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    masters = Masters([parameter])
    optimizer = torch.optim.SGD(masters.parameters, lr=1e-3)
    for _ in range(20):
        parameter.grad = torch.ones_like(parameter)
        masters.take_gradients()
        optimizer.step()
        masters.give_values()
    assert parameter.item() == pytest.approx(0.98, abs=5e-3)


def test_autocast_around_retraining_reads_the_weights_anew() -> None:
    tasks = [task(rows(seed), seed) for seed in (0, 1)]
    zipped = tz.zip(tasks, share=1.0, progress=False)
    disturb(zipped)
    with torch.autocast("cpu", torch.bfloat16):
        tz.retrain(zipped, tasks, steps=40, loss="distill", progress=False)
    held_out = zipped.history.later[-1]["held_out_loss"]
    assert held_out["after"] < 0.8 * held_out["before"] and torch.is_autocast_cache_enabled()


class Spectral(nn.Module):
    """Complex weights, and a complex output."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.mix, self.out = nn.Linear(4, 8, dtype=torch.cfloat), nn.Linear(8, 3)
        self.waves = nn.Linear(8, 2, dtype=torch.cfloat)

    def forward(self, x: Tensor) -> Any:
        x = self.mix(torch.fft.rfft(x))
        return self.out(x.abs()), self.waves(x)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_complex_weights_and_outputs() -> None:
    tasks = [tz.Task(name, Spectral(seed).eval(), list(torch.randn(8, 16, 6))) for seed, name in enumerate("ab")]
    zipped = tz.zip(tasks, share=1.0, progress=False)
    with torch.no_grad():
        for parameter in zipped.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    tz.retrain(zipped, tasks, steps=60, loss="distill", progress=False)
    held_out = zipped.history.later[-1]["held_out_loss"]
    assert held_out["after"] < 0.8 * held_out["before"]


class InPlace(nn.Module):
    """Normalises its input in place."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = net(seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.sub_(1.0).div_(2.0))


def test_networks_that_write_into_their_input() -> None:
    """They learn what twins learn that write into a copy, and the data stay."""
    found = []
    for change in (lambda x: x, torch.clone):
        data = rows(0)
        tasks = [
            tz.Task(name, InPlace(seed).eval(), data, forward=lambda m, b, change=change: m(change(b[0])))
            for seed, name in enumerate("ab")
        ]
        zipped = tz.zip(tasks, share=1.0, progress=False)
        losses = tz.retrain(zipped, tasks, steps=6, loss="distill", progress=False)
        found.append((losses, tz.measure(zipped, tasks, dict.fromkeys("ab", data))))
        assert all(torch.equal(x, y) for (x, _), (y, _) in zip(data, rows(0), strict=True))
    assert found[0] == found[1]


def test_labels_that_are_not_finite_are_refused_at_the_start() -> None:
    data = [(x, torch.full((16, 3), torch.nan)) for x, _ in rows(0)]
    tasks = [tz.Task(name, net(seed), data, loss=nn.functional.mse_loss) for seed, name in enumerate("ab")]
    zipped = tz.zip(tasks, share=1.0, progress=False)
    with pytest.raises(tz.InputError, match="task 'a': the loss of its held-out batches is nan: check the targets"):
        tz.retrain(zipped, tasks, steps=2, progress=False)
