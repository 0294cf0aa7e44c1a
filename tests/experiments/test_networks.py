"""Base networks: they learn, are trained once, and a training that was killed ends as if it had not been."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from taskzip.datasets import mnist
from taskzip.experiments.networks import BATCH, Shelf, Training, error_of, shuffle_units
from taskzip.models import LeNet5, LeNet300


def test_it_learns_is_trained_once_and_comes_back_the_same(tmp_path: Path) -> None:
    said: list[str] = []
    shelf = Shelf(tmp_path, said.append)
    test = mnist(split="test")
    first = shelf.trained("lenet300", "mnist", 3)
    again = shelf.trained("lenet300", "mnist", 3)
    other = shelf.trained("lenet300", "mnist", 4)
    assert error_of(first, test) < 20 and not first.training
    assert [line.split(":")[0] for line in said] == [f"training lenet300 number {k} on mnist" for k in (3, 4)]
    x = test[0][:7]
    assert torch.equal(first(x), again(x)) and not torch.allclose(first(x), other(x))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "lenet300-mnist-3.safetensors", "lenet300-mnist-4.safetensors"
    ]  # fmt: skip


class Killed(Exception):
    pass


@pytest.mark.parametrize("build", [LeNet300, LeNet5])
def test_a_killed_training_goes_on_where_its_last_epoch_ended(
    tmp_path: Path, build: type[torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = (each[: 5 * BATCH] for each in mnist(split="train"))

    def train(half_way: Path) -> torch.nn.Module:
        torch.manual_seed(0)
        model = build()
        Training(model, 13, 0, half_way).run(images, labels)
        return model

    whole = train(tmp_path / "whole.safetensors")
    step, done = Training._step, []

    def killed(self: Training, *batch: torch.Tensor) -> None:
        if len(done) == 7:
            raise Killed
        done.append(1)
        step(self, *batch)

    monkeypatch.setattr(Training, "_step", killed)
    with pytest.raises(Killed):
        train(tmp_path / "half.safetensors")
    monkeypatch.setattr(Training, "_step", lambda self, *batch: done.append(1) or step(self, *batch))
    resumed = train(tmp_path / "half.safetensors")
    assert len(done) == 7 + 13 - 5  # the two steps after the first epoch were lost
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_shuffled_units_compute_the_same() -> None:
    model, x = LeNet5().double().eval(), torch.rand(3, 1, 28, 28, dtype=torch.float64)
    before, weight = model(x), model.fc1.weight.detach().clone()
    shuffle_units(model, x[:2], seed=0)
    torch.testing.assert_close(model(x), before, atol=1e-12, rtol=0)
    assert not torch.equal(model.fc1.weight, weight)


def test_error_counts_wrong_answers() -> None:
    images = torch.eye(10).reshape(10, 10)
    assert error_of(torch.nn.Identity(), (images, torch.arange(10))) == 0
    assert error_of(torch.nn.Identity(), (images, torch.arange(10).roll(1))) == 100
    assert error_of(torch.nn.Identity(), (images, torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9, 8]))) == pytest.approx(20)
