"""Zipping without weights from private to shared units: the closed form, the block rule, and what depends on what."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from twin import zip_twin
from zipping.test_many_tasks import cnn as wide_cnn
from zipping.test_many_tasks import drawn
from zipping.test_many_tasks import run_zip as run_many
from zipping.test_zipping import (
    Case,
    assert_close,
    assert_is_twin,
    batch_normed,
    cnn,
    count,
    fc,
    images,
    partly_equal,
    rgb_and_grey,
    run_zip,
    same_fc,
    uneven_cnn,
    uneven_fc,
    vectors,
    wider_first,
)

import taskzip as tz
from taskzip.models import ResNet20
from taskzip.zipped.blocks import installed, spec_of

DOUBLE = torch.float64


# --- the closed form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("matching", ["greedy", "optimal"])
@pytest.mark.parametrize("case", [uneven_fc, wider_first, uneven_cnn, rgb_and_grey])
def test_agrees_with_the_literal_twin(case: Case, matching: str, compensate: bool, share: float) -> None:
    models, data, sizes = case()
    batches = [list(each.split(size)) for each, size in zip(data, sizes, strict=True)]
    options = {
        "share": share,
        "matching": matching,
        "compensate": compensate,
        "balance": 0.3,
        "cross": False,
        "ridge": 0.1,
    }
    zipped = run_zip(models, batches, **options)
    twin = zip_twin(models, [each.numpy() for each in data], **options)
    assert_is_twin(zipped, twin, data)


def test_many_inputs_for_few_samples() -> None:
    """Curvatures stay factored; that must not matter."""
    make = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 17**2, 5), nn.ReLU(), nn.Linear(5, 2)
    ).to(DOUBLE)
    models, data = [make(), make()], [torch.randn(20, 1, 19, 19, dtype=DOUBLE) for _ in "ab"]
    options = {"share": 0.5, "matching": "greedy", "compensate": True, "cross": False, "ridge": 0.1}
    zipped = run_zip(models, [[each] for each in data], **options)
    twin = zip_twin(models, [each.numpy() for each in data], **options)
    assert [r.cost for r in zipped.history.layers[:2]] == pytest.approx([turn.cost for turn in twin.turns], rel=1e-5)
    for task, name in enumerate("ab"):
        assert_close(zipped[name](data[task]), twin(task, data[task].numpy()), 1e-5)


def three_with_known_groups() -> list[nn.Sequential]:
    """First layers that have equal units; second layers that nearly agree, of which c has fewer units."""
    groups = ["abc", "abc", "abc", "ab", "ab", "ac", "bc", ""]
    model, models = fc(5, 8, 7, 3), []
    for name, units in zip("abc", (7, 7, 5), strict=True):
        other = fc(5, 8, units, 3)
        with torch.no_grad():
            other[2].weight.copy_(model[2].weight[:units] + 0.01 * torch.randn(units, 8, dtype=DOUBLE))
            other[2].bias.copy_(model[2].bias[:units])
            for unit, owners in enumerate(groups):
                if name in owners:
                    other[0].weight[unit] = model[0].weight[unit]
                    other[0].bias[unit] = model[0].bias[unit]
        models.append(other)
    return models


def places(rows: Tensor, among: Tensor) -> Tensor:
    """Where each row stands in a matrix that has the same rows in another order."""
    return (rows[:, None] == among[None]).all(2).nonzero()[:, 1]


def test_three_tasks_give_the_closed_form_over_what_all_owners_read() -> None:
    """(sum H_ss)^-1 (sum H_s: w_t), also where the owners came together one after another."""
    models, data = three_with_known_groups(), [vectors(60, 5) for _ in range(3)]
    share = tz.Threshold({"0": 1e-9, "2": 1e9})
    zipped = run_many(models, data, share=share, compensate=False, cross=False)
    first = rows_by_owners(zipped, "0")
    assert sorted(first["a"]) == [("a",), ("a", "b"), ("a", "b", "c"), ("a", "c")]
    for owners in [("a", "b", "c"), ("a", "b")]:
        totals, wanted, found = 0.0, 0.0, []
        for name, model, x in zip("abc", models, data, strict=True):
            if name not in owners:
                continue
            net, (h1, h2) = zipped[name], (model[0].weight, model[4].weight.T)
            own, second = places(net[0].weight, h1), rows_by_owners(zipped, "2")[name][owners]
            before = torch.cat([model[2].weight[:, own], model[2].bias[:, None]], 1)[places(net[4].weight.T, h2)][
                second
            ]
            read = sorted(i for each, at in first[name].items() if set(owners) <= set(each) for i in at)
            inputs = torch.cat([net[:2](x), torch.ones(len(x), 1, dtype=DOUBLE)], 1)
            h = inputs.T @ inputs / len(x) / 3
            h = h + 1e-2 * h.diagonal().mean() * torch.eye(len(h), dtype=DOUBLE)
            kept = torch.tensor([*read, len(h) - 1])
            totals, wanted = totals + h[kept][:, kept], wanted + h[kept] @ before.T
            now = torch.cat([net[2].weight, net[2].bias[:, None]], 1)[second]
            found.append(now[:, kept])
            assert now.count_nonzero() == now[:, kept].numel()
        for each in found:
            assert_close(each, torch.linalg.solve(totals, wanted).T, 1e-9)


def rows_by_owners(zipped: tz.ZippedModel, layer: str) -> dict[str, dict[tuple[str, ...], list[int]]]:
    """Per task, which of a layer's rows belong to whom."""
    found: dict[str, dict[tuple[str, ...], list[int]]] = {}
    for name in zipped:
        spec, start = spec_of(installed(zipped[name])[f"{layer}.bias"]), 0
        rows = sorted(range(spec.dense_shape[0]), key=(spec.order or range(spec.dense_shape[0])).__getitem__)
        for row in spec.rows:
            end = start + row.blocks[0].shape[0]
            found.setdefault(name, {})[tuple(row.blocks[0].name.split("+"))] = sorted(rows[start:end])
            start = end
    return found


# --- the block rule -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: [fc(5, 8, 7, 3) for _ in "ab"], lambda: [cnn() for _ in "ab"]])
@pytest.mark.parametrize("compensate", [False, True])
def test_everything_shared_is_the_same_with_and_without(make: Callable[[], Any], compensate: bool) -> None:
    models = make()
    data = [[images(20) if isinstance(models[0][0], nn.Conv2d) else vectors(30, 5)] for _ in "ab"]
    one, other = (run_zip(models, data, cross=cross, compensate=compensate, own_scale=False) for cross in (True, False))
    for name, (x,) in zip("ab", data, strict=True):
        assert torch.equal(one[name](x), other[name](x))
    assert one.parameter_count() == other.parameter_count()


@pytest.mark.parametrize("share, first, second", [(0.25, 2, 2), (0.5, 4, 4), (1.0, 8, 7)])
def test_parameters_of_linear_layers(share: float, first: int, second: int) -> None:
    models = [fc(4, 8, 9, 2), fc(4, 10, 7, 3)]
    zipped = run_zip(models, [[vectors(20, 4)], [vectors(20, 4)]], share=share, cross=False)
    shared = [5 * first, first * second + second]
    private = [5 * (8 - first) + 5 * (10 - first), 9 * (9 - second) + 11 * (7 - second)]
    out = [count(model[4]) for model in models]
    assert [r.after for r in zipped.history.layers] == [s + p for s, p in zip(shared, private, strict=True)] + [
        sum(out)
    ]
    assert zipped.parameter_count() == sum(shared) + sum(private) + sum(out)
    assert zipped.shared_parameter_count() == sum(shared)
    assert zipped.parameter_count(["a"]) == sum(shared) + 5 * (8 - first) + 9 * (9 - second) + out[0]


@pytest.mark.parametrize("share, kernels, units", [(0.25, (1, 1), 2), (0.5, (2, 2), 3), (1.0, (4, 4), 6)])
def test_parameters_of_convolutions(share: float, kernels: tuple[int, int], units: int) -> None:
    models = [cnn(1, (4, 5), 6), cnn(1, (5, 4), 7)]
    zipped = run_zip(models, [[images(10)], [images(10)]], share=share, cross=False)
    first, second = kernels
    saved = [
        9 * first + first,
        4 * (4 + 5 - first) * second + second,
        4 * (5 + 4 - second) * units + units,  # 4 pixels of each kernel behind the flatten
        0,
    ]
    assert [r.before - r.after for r in zipped.history.layers] == saved
    assert zipped.parameter_count() == count(*models) - sum(saved)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_block_rule_holds_for_three_tasks(share: float) -> None:
    """A block from one group to another exists where the first has all owners of the second."""
    models, x = [wide_cnn(seed, width) for seed, width in enumerate((6, 7, 5))], drawn(2, 30, 1, 9, 9)
    zipped = run_many(models, [x] * 3, share=share, cross=False)
    inputs: dict[frozenset[str], int] = {frozenset("abc"): 1}
    total, kinds = sum(3 * (8 + 1) for _ in models), set()
    for layer, taps, repeat in ((0, 9, 1), (2, 9, 9), (5, 1, 1)):
        units: dict[frozenset[str], int] = {}
        for each in rows_by_owners(zipped, str(layer)).values():
            units |= {frozenset(owners): len(rows) for owners, rows in each.items()}
        for mine, n in units.items():
            total += n + sum(n * m * taps for theirs, m in inputs.items() if mine <= theirs)
        inputs = {owners: n * repeat for owners, n in units.items()}
        kinds |= set(map(len, units))
    assert zipped.parameter_count() == total and kinds == ({1, 2, 3} if share >= 0.5 else {1, 2})
    for name in zipped:
        names = [key.split(".")[-1] for key, _ in zipped[name].named_parameters()]
        assert not any("@" in each for each in names)


def half_shared(make: Callable[[], nn.Module], x: Tensor, tasks: str = "ab", **options: Any) -> tz.ZippedModel:
    return run_many([make().to(DOUBLE).eval() for _ in tasks], [x] * len(tasks), **{"share": 0.5, **options})


@pytest.mark.parametrize("tasks, share", [("ab", 0.5), ("abc", 0.75)])
@pytest.mark.parametrize("make", [lambda: fc(81, 8, 7, 3), cnn, batch_normed])
def test_units_depend_on_units_of_all_their_owners_only(
    make: Callable[[], nn.Sequential], tasks: str, share: float
) -> None:
    """On one input a shared unit's pre-activation is the same in all tasks, whatever the private weights are."""
    torch.manual_seed(1)
    x = images(30) if isinstance(make()[0], nn.Conv2d) else images(30).flatten(1)
    zipped = half_shared(make, x, tasks, share=share, cross=False, batch_norm="fold")
    seen: list[dict[str, dict[tuple[str, ...], Tensor]]] = []
    for _ in range(2):
        seen.append(pre_activations(zipped, x))
        with torch.no_grad():
            for key, parameter in zipped.named_parameters():
                if "+" not in key:
                    parameter.normal_()
    for layer, groups in seen[0].items():
        for owners, per_task in groups.items():
            values = [*per_task, *seen[1][layer][owners]] if len(owners) > 1 else []
            for value in values:
                assert_close(value, values[0], 1e-12)
    assert any(len(owners) == len(tasks) for groups in seen[0].values() for owners in groups)


def pre_activations(zipped: tz.ZippedModel, x: Tensor) -> dict[str, dict[tuple[str, ...], list[Tensor]]]:
    """Per layer and owners, what these units answer in each task."""
    found: dict[str, dict[tuple[str, ...], list[Tensor]]] = {}
    for name in zipped:
        layers = [key.removesuffix(".weight") for key in installed(zipped[name]) if key.endswith("weight")]
        for layer in layers:
            rows, caught = rows_by_owners(zipped, layer)[name], []
            module = zipped[name].get_submodule(layer)
            with torch.no_grad(), module.register_forward_hook(lambda _m, _x, y, caught=caught: caught.append(y)):
                zipped[name](x)
            for owners, places_ in rows.items():
                found.setdefault(layer, {}).setdefault(owners, []).append(caught[0][:, places_])
    return found


def test_no_task_uses_what_is_not_there() -> None:
    """The dense weights have zeros there, and the same outputs."""
    x = images(20)
    zipped = half_shared(cnn, x, cross=False)
    for name in zipped:
        dense = zipped.materialize(name)
        assert_close(dense(x), zipped[name](x), 1e-12)
        shared = rows_by_owners(zipped, "2")[name]["a", "b"]
        assert not dense[2].weight[shared][:, 2:].any() and dense[2].weight[shared][:, :2].all()


def test_saved_and_loaded(tmp_path) -> None:
    x = images(20)
    zipped = half_shared(cnn, x, "abc", cross=False)
    zipped.save(tmp_path / "joint.safetensors")
    loaded = tz.load(tmp_path / "joint.safetensors", {name: cnn() for name in zipped})
    assert sum(each.numel() for each in load_file(tmp_path / "joint.safetensors").values()) == zipped.parameter_count()
    for name in zipped:
        assert torch.equal(loaded[name](x), zipped[name](x))
    assert loaded.parameter_count() == zipped.parameter_count() and loaded.summary() == zipped.summary()
    assert loaded.history.settings["cross"] is False
    copied = copy.deepcopy(loaded)
    assert torch.equal(copied["c"](x), zipped["c"](x))


# --- what it loses ------------------------------------------------------------------------------------------------


def test_a_pair_that_reads_only_what_is_shared_costs_nothing() -> None:
    """Units that have no weights from private units anyway are found, and nothing changes."""
    models, x = partly_equal(), vectors(50, 5)
    model, other = models
    with torch.no_grad():  # of A's first layer B has all but three units: no second unit of A may read those
        mine = (model[0].weight[:, None] == other[0].weight[None]).all(2).any(1)
        model[2].weight[:4, ~mine] = 0
        order = (model[0].weight[:, None] == other[0].weight[None]).all(2).double()
        other[2].weight.copy_(model[2].weight @ order)
        other[2].bias.copy_(model[2].bias)
        other[2].weight[4:, :] += 1
    zipped = run_zip(models, [[x], [x]], share=tz.Threshold(1e-9), cross=False, compensate=False)
    assert [r.shared for r in zipped.history.layers] == [5, 4, 0]
    for name, each in zip("ab", models, strict=True):
        assert_close(zipped[name](x), each(x), 1e-6)


@pytest.mark.parametrize("batch_norm", ["private", "fold"])
def test_batch_norm_keeps_mean_and_spread(batch_norm: Any) -> None:
    """Each unit's answers have, after zipping, nearly the mean and spread that they had before."""
    torch.manual_seed(2)
    models, x = [batch_normed().eval() for _ in "ab"], images(400)
    with torch.no_grad():
        originals = [sorted(model[:6](x).std(0).tolist()) for model in models]
        zipped = run_zip(models, [[x], [x]], share=0.6, cross=False, batch_norm=batch_norm)
        for name, before in zip("ab", originals, strict=True):
            now = sorted(zipped[name][:6](x).std(0).tolist())
            assert now == pytest.approx(before, rel=0.35)


def test_zeros_of_pruned_networks_stay() -> None:
    models = [fc(6, 10, 9, 3), fc(6, 10, 9, 3)]
    with torch.no_grad():
        for model in models:
            for layer in (model[0], model[2]):
                layer.weight.mul_(torch.rand_like(layer.weight) < 0.6)
    data = [vectors(80, 6), vectors(80, 6)]
    zipped = run_zip(models, [[each] for each in data], share=0.5, cross=False)
    apart = sum(int(model[k].weight.count_nonzero()) for model in models for k in (0, 2, 4))
    assert zipped.connection_count() < apart
    for name, model in zip("ab", models, strict=True):
        for k in (0, 2):
            most = model[k].weight.count_nonzero(1).max()
            dense = zipped.materialize(name)[k].weight
            assert dense.count_nonzero(1).max() <= max(most, 9) and (dense == 0).sum() > 0
    shared = zipped["a"][2].weight_blocks.get_parameter("a+b")
    assert 0 < shared.count_nonzero() < shared.numel()
    before = shared.detach() == 0
    tasks = [tz.Task(n, m, [(x, torch.randint(3, (80,)))]) for n, m, x in zip("ab", models, data, strict=True)]
    tz.retrain(zipped, tasks, steps=5, progress=False)
    assert torch.equal(shared == 0, before)


def test_retraining_reaches_all_that_is_there() -> None:
    x = images(40)
    models = [cnn(), cnn()]
    tasks = [tz.Task(n, m, [(x, torch.randint(3, (40,)))]) for n, m in zip("ab", models, strict=True)]
    zipped = tz.zip(tasks, share=0.5, cross=False, progress=False)
    before = {key: p.detach().clone() for key, p in zipped.named_parameters()}
    tz.retrain(zipped, tasks, steps=5, progress=False)
    assert all((p != before[key]).any() for key, p in zipped.named_parameters())


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_residual_streams_are_common_where_all_layers_share_them(share: float) -> None:
    torch.manual_seed(0)
    models, x = [ResNet20(widths=(4, 6, 8)).eval() for _ in "ab"], torch.randn(6, 3, 16, 16)
    zipped = run_many(models, [x] * 2, share=share, cross=False, batch_norm="fold", max_rows="auto")
    seen = pre_activations(zipped, x)
    assert len(seen) > 15
    for groups in seen.values():
        first, second = groups["a", "b"]
        assert_close(first, second, 1e-5)


def test_budget() -> None:
    models, data, _ = same_fc()
    tasks = [tz.Task(name, model, [x]) for name, model, x in zip("ab", models, data, strict=True)]
    zipped = tz.zip(tasks, share=tz.Budget(0.75), cross=False, progress=False)
    assert 0.6 * count(*models) < zipped.parameter_count() <= 0.75 * count(*models)


# --- what cannot be -----------------------------------------------------------------------------------------------


def test_settings_that_contradict_each_other() -> None:
    models, data, _ = uneven_fc()
    with pytest.raises(tz.InputError, match=r"aligned=True .* cross=False"):
        run_zip(models, [[x] for x in data], aligned=True, cross=False)
    with pytest.raises(tz.InputError, match="cross=None"):
        run_zip(models, [[x] for x in data], cross=None)


def test_a_bias_that_one_network_lacks() -> None:
    models, x = [fc(5, 6, 4, 2), fc(5, 6, 4, 2)], vectors(30, 5)
    models[1][2] = nn.Linear(6, 4, bias=False).to(DOUBLE)
    zipped = run_zip(models, [[x], [x]], cross=False)
    assert [r.shared for r in zipped.history.layers] == [6, 0, 0]
    assert "one bias" in zipped.history.layers[1].note
    with pytest.raises(tz.InputError, match=r"'2' cannot be shared .*one bias"):
        run_zip(models, [[x], [x]], share={"0": 0.5, "2": 0.5}, cross=False)


class Own(nn.Linear):
    """A forward of its own, in which a dense weight is wanted."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.linear(input, self.weight, self.bias)


def test_layers_with_a_forward_of_their_own() -> None:
    models = [nn.Sequential(Own(5, 8), nn.ReLU(), Own(8, 6), nn.ReLU(), nn.Linear(6, 2)).to(DOUBLE) for _ in "ab"]
    x = vectors(40, 5)
    zipped = run_zip(models, [[x], [x]], share=0.5, cross=False)
    plain = run_zip([like(model) for model in models], [[x], [x]], share=0.5, cross=False)
    assert zipped.parameter_count() == plain.parameter_count()
    for name in "ab":
        assert_close(zipped[name](x), plain[name](x), 1e-9)


def like(model: nn.Sequential) -> nn.Sequential:
    """The same network of torch's own layers."""
    other = fc(5, 8, 6, 2)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("task", ["groups", "reads", "apart", "ordered"])
def test_tasks_may_be_called_anything(task: str) -> None:
    x = vectors(30, 5)
    tasks = [tz.Task(name, fc(5, 6, 4, 2), [x]) for name in (task, "b")]
    assert tz.zip(tasks, share=0.5, cross=False, progress=False)[task](x).shape == (30, 2)
