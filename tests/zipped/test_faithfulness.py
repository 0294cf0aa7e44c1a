"""A zip says how far its answers are from the original's, and what is odd about its calibration data."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taskzip as tz
from taskzip.datasets import batches

DOUBLE = torch.float64


def network(width: int = 16, classes: int = 4) -> nn.Sequential:
    """A network whose classes are where the largest of the first inputs is."""
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, classes)).to(DOUBLE)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(60):
        x, y = labelled(128)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def labelled(samples: int = 300) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 8, dtype=DOUBLE)
    return x, x[:, :4].argmax(1)


def run_zip(data: Any, model: nn.Module | None = None, share: float = 0.5, **of: Any) -> tz.ZippedModel:
    tasks = [tz.Task(name, model or network(), data, **of) for name in "ab"]
    return tz.zip(tasks, share=share, progress=False)


def literal(model: nn.Module, zipped: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y, z = model(x), zipped(x)
    return float((y - z).square().sum() / (y - y.mean(0)).square().sum())


def test_the_error_is_that_of_a_literal_twin(caplog: pytest.LogCaptureFixture) -> None:
    models, (x, y) = [network(), network()], labelled(120)
    tasks = [tz.Task(name, m, batches(x, y, size=64)) for name, m in zip("ab", models, strict=True)]
    with caplog.at_level(logging.INFO, "taskzip"):
        zipped = tz.zip(tasks, share=0.5, progress=False)
    for name, model in zip("ab", models, strict=True):
        found = zipped.history.settings["answers"][name]
        assert found["samples"] == 120
        assert found["error"] == pytest.approx(literal(model, zipped[name], x), rel=1e-9)
        with torch.no_grad():
            assert found["alike"] == float((model(x).argmax(1) == zipped[name](x).argmax(1)).double().mean())
        assert f"task '{name}': error of the answers {found['error']:.2g}" in caplog.text
        assert f"{name} {found['error']:.2g} (" in zipped.summary()
    assert "Error on 120 calibration samples when zipped" in zipped.summary()


def test_checkpoints_keep_it_and_need_not_have_it(tmp_path: Path) -> None:
    model = network()
    zipped = run_zip(batches(*labelled()), model)
    zipped.save(tmp_path / "a.safetensors")
    again = tz.load(tmp_path / "a.safetensors", {"a": network(), "b": network()})
    assert again.history.settings["answers"] == zipped.history.settings["answers"]
    del again.history.settings["answers"]
    assert "when zipped" not in again.summary()


def test_samples_come_from_all_over_the_data() -> None:
    """Data that are sorted by class."""
    x, y = labelled(2000)
    order = y.argsort(stable=True)
    models = [network(), network()]
    data = list(zip(x[order].split(50), y[order].split(50), strict=True))
    zipped = tz.zip([tz.Task(n, m, data) for n, m in zip("ab", models, strict=True)], share=0.5, progress=False)
    for name, model in zip("ab", models, strict=True):
        found = zipped.history.settings["answers"][name]
        assert 125 < found["samples"] < 200
        assert found["error"] == pytest.approx(literal(model, zipped[name], x), rel=0.5)


class Fixed(nn.Sequential):
    """Takes batches of one size only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.zeros(300, 8, dtype=DOUBLE))


def test_batches_of_one_size() -> None:
    model = Fixed(*network())
    zipped = run_zip([labelled(300)[0] for _ in range(3)], model)
    assert zipped.history.settings["answers"]["a"]["samples"] in (300, 600, 900)


class Sums(nn.Module):
    """Answers of several tensors, of other lengths from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = network()

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.inside(x)
        return y, {"sum": y.sum(2), "words": y.argmax(2)}


def test_outputs_of_any_form() -> None:
    torch.manual_seed(1)
    data = [torch.randn(40, length, 8, dtype=DOUBLE) for length in (3, 5, 7)]
    found = run_zip(data, Sums()).history.settings["answers"]["a"]
    assert found["alike"] is None
    assert 0 <= found["error"] < 0.5


def said(data: Any, width: int, **options: Any) -> tuple[tz.ZippedModel, str]:
    """What is said of two networks that have nothing to do with each other, fully shared."""
    tasks = []
    for name in "ab":
        model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
        with torch.no_grad():
            for module in (0, 2, 4):
                model[module].weight.normal_().div_(model[module].in_features ** 0.5)
        tasks.append(tz.Task(name, model.to(DOUBLE), data))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        zipped = tz.zip(tasks, share=1.0, progress=False, **options)
    return zipped, "\n".join(str(each.message) for each in found if each.category is tz.TaskzipWarning)


def test_answers_that_are_far_off() -> None:
    zipped, text = said([torch.randn(300, 8, dtype=DOUBLE)], 16, compensate=False, matching="random")
    assert zipped.history.settings["answers"]["a"]["error"] > 0.5
    assert "task 'a': the joint network's answers are far from the original's" in text


def test_too_few_samples() -> None:
    assert "task 'a': 8 calibration samples are too few" in said([torch.randn(8, 8, dtype=DOUBLE)], 48)[1]
    assert "too few" not in said([torch.randn(1000, 8, dtype=DOUBLE)], 48)[1]


def test_answers_that_are_constant() -> None:
    with pytest.warns(tz.TaskzipWarning, match="the same answer to all 64 calibration samples"):
        run_zip([torch.zeros(64, 8, dtype=DOUBLE)])


def test_labels_of_another_task() -> None:
    x, y = labelled()
    with pytest.warns(tz.TaskzipWarning, match="is right on .* are these its own data"):
        run_zip(batches(x, (y + 1) % 4))


def test_inputs_on_another_scale() -> None:
    with pytest.warns(tz.TaskzipWarning, match="class scores lie .* apart: are its inputs scaled"):
        run_zip([255 * labelled()[0]])


def test_sound_zips_are_quiet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_zip(batches(*labelled(), size=100, shuffle=True), share=1.0)
