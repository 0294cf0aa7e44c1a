"""Which zeros are missing connections: those of pruned networks, not a few, nor those of a coarse grid."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskzip as tz
from taskzip.algebra import sparsity
from taskzip.algebra.sparsity import pruned_layers

DOUBLE = torch.float64


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def heavy(*shape: int) -> Tensor:
    """A few weights are much larger than the others, so that a grid of 8 bits is coarse."""
    return torch.distributions.Laplace(0.0, 1.0).sample(shape) * (1 + 4 * (torch.rand(shape) < 0.001))


def rounded(weight: Tensor, bits: int, *, by_row: bool = False) -> Tensor:
    """As it comes from symmetric quantisation."""
    flat = weight.flatten(1)
    step = (flat.abs().amax(1, keepdim=True) if by_row else flat.abs().max()) / (2 ** (bits - 1) - 1)
    return (step * (flat / step).round()).view_as(weight)


def scattered(weight: Tensor, part: float) -> Tensor:
    return weight * (torch.rand_like(weight) >= part)


def cut(weight: Tensor, part: float) -> Tensor:
    """Without its smallest weights."""
    return weight * (weight.abs() > weight.abs().flatten().kthvalue(max(1, round(part * weight.numel()))).values)


def without_units(weight: Tensor, part: float) -> Tensor:
    weight = weight.clone()
    weight[: round(part * len(weight))] = 0
    return weight


KINDS: dict[str, tuple[Callable[[], Tensor], bool]] = {
    "no zeros": (lambda: normal(64, 100), False),
    "1.5% by chance": (lambda: scattered(normal(64, 100), 0.015), False),
    "8 bits": (lambda: rounded(normal(64, 100), 8), False),
    "8 bits by unit": (lambda: rounded(normal(64, 100), 8, by_row=True), False),
    "8 bits, outliers": (lambda: rounded(heavy(256, 300), 8), False),
    "8 bits, later in half precision": (lambda: rounded(normal(64, 100), 8).half(), False),
    "8 bits, later in bfloat16": (lambda: rounded(heavy(64, 100), 8).bfloat16(), False),
    "4 bits": (lambda: rounded(normal(64, 100), 4), False),
    "4 bits by unit": (lambda: rounded(normal(64, 100), 4, by_row=True), False),
    "4 bits by kernel": (lambda: rounded(normal(64, 3, 3, 3), 4, by_row=True), False),
    "7%": (lambda: scattered(normal(64, 100), 0.07), True),
    "a third by chance": (lambda: scattered(normal(64, 100), 0.33), True),
    "a third of the smallest": (lambda: cut(normal(64, 100), 0.33), True),
    "a tenth of the smallest": (lambda: cut(normal(64, 100), 0.1), True),
    "small kernels": (lambda: scattered(normal(16, 1, 3, 3), 0.2), True),
    "in bfloat16": (lambda: cut(normal(256, 300), 0.5).bfloat16(), True),
    "93%, then 8 bits": (lambda: rounded(cut(normal(64, 100), 0.93), 8), True),
    "half, then 8 bits by unit": (lambda: rounded(cut(normal(64, 100), 0.5), 8, by_row=True), True),
    "half, then 4 bits": (lambda: rounded(cut(normal(64, 100), 0.5), 4), True),
    "a quarter of the units": (lambda: without_units(normal(64, 100), 0.25), True),
    "a quarter of the inputs": (lambda: without_units(normal(100, 64), 0.25).T.contiguous(), True),
    "everything": (lambda: torch.zeros(8, 9), True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_of_one_layer(kind: str) -> None:
    make, pruned = KINDS[kind]
    for _ in range(3):
        assert pruned_layers({"layer": make()}) == ({"layer"} if pruned else set())


def test_in_a_pruned_network_every_zero_counts() -> None:
    """But a layer without any is not pruned, nor is one that is rounded."""
    few, many = scattered(normal(30, 40), 0.02), cut(normal(300, 100), 0.9)
    weights = {"few": few, "many": many, "none": normal(9, 9), "rounded": rounded(normal(40, 50), 4)}
    assert pruned_layers(weights) == {"few", "many"}
    assert pruned_layers({"few": few, "none": normal(90, 90)}) == set()


def test_a_layer_that_began_at_zero_says_nothing_of_others() -> None:
    weights = {"zero": torch.zeros(300, 300), "few": scattered(normal(30, 40), 0.02)}
    assert pruned_layers(weights) == {"zero"}


# --- from end to end --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(2, 12, 3), nn.Linear(12 * 9, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(self.conv(x).relu().flatten(1)).relu())


def changed(model: nn.Module, how: Callable[[Tensor], Tensor]) -> nn.Module:
    with torch.no_grad():
        for layer in model.children():
            layer.weight.copy_(how(layer.weight))
    return model.to(DOUBLE).eval()


def zipped_of(models: list[nn.Module], **options: Any) -> tz.ZippedModel:
    return tz.zip(tasks_of(models), **{"share": 1.0, "progress": False, **options})


def tasks_of(models: list[nn.Module]) -> list[tz.Task]:
    data = [torch.randn(30, 2, 5, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(k)) for k in (0, 1)]
    return [tz.Task(name, model, [x]) for name, model, x in zip("ab", models, data, strict=True)]


ACCIDENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "by chance": lambda w: scattered(w, 0.015),
    "8 bits": lambda w: rounded(w, 8),
    "4 bits": lambda w: rounded(w, 4, by_row=True),
}


@pytest.mark.parametrize("kind", ACCIDENTS)
@pytest.mark.parametrize("options", [{}, {"share": 0.5}, {"compensate": False}])
def test_accidental_zeros_are_weights_like_any_other(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The joint network is that of weights which are not quite 0; nothing is solved unit by unit or called missing."""
    models = [changed(Net(), ACCIDENTS[kind]) for _ in "ab"]
    assert any((p == 0).any() for model in models for p in model.parameters())
    nearly = [copy.deepcopy(model) for model in models]
    with torch.no_grad():
        for model in nearly:
            for layer in model.children():
                layer.weight[layer.weight == 0] = 1e-14
    wanted = zipped_of(nearly, **options)

    def unexpected(*_: Any) -> None:
        raise AssertionError("solved unit by unit")

    monkeypatch.setattr(sparsity, "support", unexpected)
    monkeypatch.setattr("taskzip.zipping.meeting.support", unexpected)
    monkeypatch.setattr("taskzip.zipping.joining.support", unexpected)
    monkeypatch.setattr("taskzip.algebra.recalibration.support", unexpected)
    zipped = zipped_of(models, **options)
    for name, task in zip("ab", tasks_of(models), strict=True):
        torch.testing.assert_close(zipped[name](task.data[0]), wanted[name](task.data[0]), rtol=1e-6, atol=1e-9)
    assert "connections" not in zipped.summary()
    whole = sum(p.numel() for p in {p for weight in zipped.layer_weights() for p in weight})
    assert zipped.connection_count() == whole
    assert zipped.layer_weights(pruned=True) == []


def test_they_may_move_while_retraining() -> None:
    models = [changed(Net(), ACCIDENTS["by chance"]) for _ in "ab"]
    zipped = zipped_of(models, share=0.0)
    zeros = zipped["a"].fc.weight == 0
    assert zeros.any()
    with torch.no_grad():
        zipped["a"].fc.bias += 0.5  # so that there is something to learn
    tz.retrain(zipped, tasks_of(models), steps=2, loss="distill", progress=False)
    assert (zipped["a"].fc.weight != 0)[zeros].double().mean() > 0.5


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_pruned_network_beside_one_that_was_rounded(share: float, tmp_path: Path) -> None:
    """Shared units have all connections; the pruned network's own ones keep theirs, through saving and retraining."""
    models = [changed(Net(), lambda w: cut(w, 0.7)), changed(Net(), ACCIDENTS["8 bits"])]
    zipped = zipped_of(models, share=share)
    assert zipped.history.settings["pruned"] == {"a": ["conv", "fc", "out"], "b": []}
    own = {p for weight in zipped.layer_weights(pruned=True) for p in weight}
    missing = {name: p == 0 for name, p in zipped.named_parameters() if any(p is each for each in own)}
    assert sum(int(each.sum()) for each in missing.values()) > 30
    total = sum(p.numel() for p in {p for weight in zipped.layer_weights() for p in weight})
    assert zipped.connection_count() == total - sum(int(each.sum()) for each in missing.values())
    assert "connections apart" in zipped.summary()
    zipped.save(tmp_path / "joint.safetensors")
    loaded = tz.load(tmp_path / "joint.safetensors", {name: Net().to(DOUBLE) for name in "ab"})
    assert loaded.connection_count() == zipped.connection_count()
    assert loaded.summary() == zipped.summary()
    tz.retrain(loaded, tasks_of(models), steps=2, loss="distill", progress=False)
    parameters = dict(loaded.named_parameters())
    assert all((parameters[name][zeros] == 0).all() for name, zeros in missing.items())


def test_in_checkpoints_of_before_every_zero_is_missing() -> None:
    models = [changed(Net(), ACCIDENTS["by chance"]) for _ in "ab"]
    zipped = zipped_of(models, share=0.0)
    zeros = sum(int((p == 0).sum()) for weight in zipped.layer_weights() for p in weight)
    whole = zipped.connection_count()
    del zipped.history.settings["pruned"]
    assert zipped.connection_count() == whole - zeros < whole


def test_pruning_keeps_every_zero() -> None:
    """Whoever asks for pruning means all of them."""
    model = changed(Net(), ACCIDENTS["by chance"])
    task = tasks_of([model, model])[0]
    small = tz.prune(task, keep={"fc": 0.98}, retrain=tz.Retraining(2, loss="distill"), progress=False)
    before, after = model.fc.weight == 0, small.fc.weight == 0
    assert (after | ~before).all()
    assert int((~after).sum()) == round(0.98 * after.numel())
