"""The order in which tasks are given decides nothing."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor, nn

import taskzip as tz


def fc(seed: int, *sizes: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double().eval()


def conv(seed: int, width: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
    ).double().eval()  # fmt: skip


THREE = [fc(k, 6, width, width, 3) for k, width in enumerate((16, 24, 32))]
X = torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def zipped_in(order: tuple[int, ...], models: list[nn.Sequential], x: Tensor, **options: object) -> tz.ZippedModel:
    tasks = [tz.Task("abc"[t], models[t], [x]) for t in order]
    return tz.zip(tasks, **{"progress": False, "share": 1.0, **options})  # type: ignore[arg-type]


def lost(zipped: tz.ZippedModel, models: list[nn.Sequential], x: Tensor) -> dict[str, float]:
    with torch.no_grad():
        return {
            name: float((zipped[name](x) - model(x)).norm() / model(x).norm())
            for name, model in zip("abc", models, strict=True)
        }


@pytest.mark.parametrize("share", [0.5, 1.0, tz.Threshold(0.02), {"0": 20, "*": 0.7}])
def test_all_orders_of_three_widths_give_the_same(share: object) -> None:
    seen = []
    for order in itertools.permutations(range(3)):
        zipped = zipped_in(order, THREE, X, share=share)
        assert list(zipped) == ["abc"[t] for t in order]
        assert [record.units[order.index(2)] for record in zipped.history.layers] == [32, 32, 3]
        seen.append((zipped.parameter_count(), lost(zipped, THREE, X)))
    for size, losses in seen:
        assert size == seen[0][0] and losses == pytest.approx(seen[0][1], rel=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"cross": False}, {"aligned": True}, {"balance": {"a": 0.2, "b": 0.3, "c": 0.5}}]
)
def test_networks_of_one_width_and_other_settings(options: dict[str, object]) -> None:
    models = [conv(seed, 6) for seed in range(3)]
    x = torch.randn(12, 1, 5, 5, dtype=torch.float64)
    seen = [zipped_in(order, models, x, share=0.5, **options) for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0))]
    losses = [lost(zipped, models, x) for zipped in seen]
    assert len({zipped.parameter_count() for zipped in seen}) == 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_fully_shared_shares_all_units_that_have_a_partner() -> None:
    zipped = zipped_in((0, 1, 2), THREE, X, own_scale=False)
    for record in zipped.history.layers[:2]:
        owned = {task: sum(units for tasks, units in record.groups if task in tasks) for task in "ab"}
        assert owned == {"a": 16, "b": 24}
        assert all("c" in tasks for tasks, _ in record.groups)  # so that the joint layer has the 32 units of c
    said = ", ".join(f"{'+'.join(tasks)} {units}" for tasks, units in zipped.history.layers[0].groups)
    assert f"{said} in 0" in zipped.summary()
    names = {name for name, _ in zipped["a"][0].bias_blocks.named_parameters()}
    assert names == {"+".join(tasks) for tasks, _ in zipped.history.layers[0].groups if "a" in tasks}
    first = 32 * 7  # every row of c, some of which others have in common
    assert sum(p.numel() for p in {p for task in zipped for p in zipped[task][0].parameters()}) == first


def test_a_fraction_is_one_of_the_smaller_network_that_is_added() -> None:
    zipped = zipped_in((1, 0, 2), THREE, X, share=0.5)
    pairs = {record.name: sum(n * (len(tasks) - 1) for tasks, n in record.groups) for record in zipped.history.layers}
    assert pairs == {"0": 12 + 8, "2": 12 + 8, "4": 0}


def test_who_shares_is_saved(tmp_path) -> None:
    zipped = zipped_in((2, 0, 1), THREE, X, share=0.5)
    zipped.save(tmp_path / "three.safetensors")
    loaded = tz.load(tmp_path / "three.safetensors", {"abc"[t]: THREE[t] for t in (2, 0, 1)})
    assert loaded.history == zipped.history and loaded.summary() == zipped.summary()
    blocks = {name for name, _ in zipped["a"][0].weight_blocks.named_parameters()}
    assert all("".join(re.split("[@:]", name)[0].split("+")) in ("cab", "ca", "ab", "a") for name in blocks)
