"""More than two tasks (Sec. 3.4): the closed form, the block rule, and every task by itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import taskzip as tz
from taskzip.algebra.curvature import damped


def fc(seed: int, *sizes: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).double().eval()


def cnn(seed: int, width: int = 6) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 5, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(45, 8), nn.ReLU(), nn.Linear(8, 3),
    ).double().eval()  # fmt: skip


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run_zip(models: list[nn.Module], data: list[Tensor], **options: object) -> tz.ZippedModel:
    tasks = [tz.Task("abcde"[i], m, [x]) for i, (m, x) in enumerate(zip(models, data, strict=True))]
    return tz.zip(tasks, **{"share": 1.0, "progress": False, "max_rows": None, **options})  # type: ignore[arg-type]


def closed_form(models: list[nn.Module], data: list[Tensor]) -> Tensor:
    """(sum H)^-1 (sum H w) for the first layer; the networks' units correspond in their natural order."""
    total, pull = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, 7, dtype=torch.float64)
    for model, x in zip(models, data, strict=True):
        rows = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        h = damped(rows.T @ rows / len(x) / len(models), 1e-2)
        total += h
        pull += h @ torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach().T
    return torch.linalg.solve(total, pull).T


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 2, 0, 3, 1), (1, 0, 4, 3, 2)])
def test_five_networks_give_the_closed_form_in_any_order(order: tuple[int, ...]) -> None:
    base = fc(0, 4, 7, 3)
    models = []
    for seed in range(5):  # near copies, so that all five agree on which units correspond
        model = fc(0, 4, 7, 3)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.add_(0.01 * drawn(10 * seed + i, *p.shape))
        models.append(model)
    data = [drawn(100 + seed, 30 + seed, 4) for seed in range(5)]
    zipped = run_zip([models[i] for i in order], [data[i] for i in order], compensate=False)
    wanted = closed_form(models, data)
    for name in zipped:
        layer = zipped[name][0]
        torch.testing.assert_close(torch.cat([layer.weight, layer.bias[:, None]], 1), wanted, rtol=1e-9, atol=1e-12)
    assert zipped.history.layers[0].shared == 7
    assert zipped.parameter_count() == sum(p.numel() for p in base[0].parameters()) + 5 * (7 * 3 + 3)


@pytest.mark.parametrize("compensate", [False, True])
def test_five_permuted_copies_are_found_and_nothing_changes(compensate: bool) -> None:
    model = cnn(3)
    models = [model]
    for seed in range(4):
        other, rng = cnn(3), torch.Generator().manual_seed(seed)
        p, q = torch.randperm(6, generator=rng), torch.randperm(8, generator=rng)
        with torch.no_grad():
            for t in (other[0].weight, other[0].bias):
                t.copy_(t[p])
            other[2].weight.copy_(other[2].weight[:, p])
            for t in (other[5].weight, other[5].bias):
                t.copy_(t[q])
            other[7].weight.copy_(other[7].weight[:, q])
        models.append(other)
    x = drawn(1, 40, 1, 9, 9)
    zipped = run_zip(models, [x] * 5, compensate=compensate, own_scale=False)
    for name in zipped:
        torch.testing.assert_close(zipped[name](x), model(x), rtol=1e-8, atol=1e-10)
    assert all(record.cost == pytest.approx(0, abs=1e-9) for record in zipped.history.layers)
    hidden = sum(p.numel() for layer in (0, 2, 5) for p in model[layer].parameters())
    assert zipped.parameter_count() == hidden + 5 * (8 * 3 + 3)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_block_rule_holds_for_three_tasks(share: float) -> None:
    """Each weight from input group to output group is one parameter for the tasks in both."""
    models, x = [cnn(seed, width) for seed, width in enumerate((6, 7, 5))], drawn(2, 30, 1, 9, 9)
    zipped = run_zip(models, [x] * 3, share=share, own_scale=False)
    inputs: dict[frozenset[str], int] = {frozenset("abc"): 1}  # per owners, how many values of the layer's input
    total = 0
    for layer, taps, repeat in ((0, 9, 1), (2, 9, 9), (5, 1, 1)):
        units: dict[frozenset[str], int] = {}
        for name in zipped:
            for key, parameter in zipped[name][layer].bias_blocks.named_parameters():
                units[frozenset(key.split("+"))] = len(parameter)
        for mine, n in units.items():
            total += n  # biases
            total += sum(n * m * taps for theirs, m in inputs.items() if mine & theirs)
        inputs = {owners: n * repeat for owners, n in units.items()}
    total += sum(3 * (8 + 1) for _ in models)
    assert zipped.parameter_count() == total


def test_tasks_stay_by_themselves_and_load_again(tmp_path) -> None:
    models, data = (
        [fc(s, n, 6, 5, 2) for s, n in enumerate((4, 7, 5))],
        [drawn(s, 25, n) for s, n in enumerate((4, 7, 5))],
    )
    zipped = run_zip(models, data, share=0.6)
    before = [zipped[name](x) for name, x in zip(zipped, data, strict=True)]
    zipped.save(tmp_path / "three.safetensors")
    fresh = {"abc"[i]: fc(9, n, 6, 5, 2).float() for i, n in enumerate((4, 7, 5))}
    loaded = tz.load(tmp_path / "three.safetensors", fresh)
    for name, x, y in zip(zipped, data, before, strict=True):
        assert torch.equal(loaded[name](x), y)
        torch.testing.assert_close(zipped.materialize(name)(x), y)
    with torch.no_grad():
        mine = set(zipped["b"].parameters())
        for parameter in set(zipped.parameters()) - mine:
            parameter.fill_(torch.nan)
    assert torch.equal(zipped["b"](data[1]), before[1])
    assert "abc"[0] in loaded.summary()


def test_a_later_task_may_join_a_pair_or_a_single_unit() -> None:
    """C's units are copies of what A and B share and of what A alone has: both kinds of groups arise."""
    a, b = fc(0, 4, 4, 2), fc(1, 4, 4, 2)
    with torch.no_grad():
        b[0].weight[:2], b[0].bias[:2] = a[0].weight[:2], a[0].bias[:2]
    c = fc(2, 4, 4, 2)
    with torch.no_grad():
        c[0].weight.copy_(a[0].weight)
        c[0].bias.copy_(a[0].bias)
    x = drawn(0, 50, 4)
    zipped = run_zip([a, b, c], [x] * 3, share=tz.Threshold(1e-12), compensate=False)
    blocks = {name for name, _ in zipped["a"][0].weight_blocks.named_parameters()}
    assert blocks == {"a+b+c", "a+c"}
    for name, model in zip(zipped, (a, b, c), strict=True):
        torch.testing.assert_close(zipped[name](x), model(x), rtol=1e-9, atol=1e-12)
