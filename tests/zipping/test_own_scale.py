"""Every task has a scale and a shift of its own for shared units, where no batch-norm is one already."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskzip as tz
from taskzip.algebra.merging import merge_weights
from taskzip.errors import InputError
from taskzip.zipped.blocks import installed, spec_of

DOUBLE = torch.float64


class Subclassed(nn.Linear):
    """Does more than torch's layer, so that nothing may be done behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-3, 3)


def smooth(classes: int, *, bias: bool = True, hidden: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    return nn.Sequential(
        hidden(5, 9, bias=bias), nn.Tanh(), hidden(9, 8, bias=bias), nn.GELU(), nn.Linear(8, classes)
    ).double()


def images(classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.SiLU(), nn.Conv2d(6, 7, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(112, classes)
    ).double()


def sequences(classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 6, 3), nn.SiLU(), nn.Conv1d(6, 7, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(28, classes)
    ).double()


KINDS = {smooth: (5,), images: (2, 6, 6), sequences: (2, 6)}


def pair(make: Callable[[int], nn.Module]) -> tuple[list[nn.Module], list[list[Tensor]]]:
    models = [make(classes).eval() for classes in (3, 4)]
    return models, [[torch.randn(200, *KINDS[make], dtype=DOUBLE) for _ in range(3)] for _ in models]


def related(make: Callable[[int], nn.Module]) -> tuple[list[nn.Module], list[list[Tensor]]]:
    """Another network, and the same with units of another size, and with noise on all of its weights."""
    models, data = pair(make)
    first, other = models[0], copy.deepcopy(models[0])
    for layer in [layer for layer in other if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv1d))][:-1]:
        scale = torch.rand(len(layer.weight), dtype=DOUBLE) + 0.5
        layer.weight.data *= scale.view(-1, *(1,) * (layer.weight.dim() - 1))
    for p in other.parameters():
        p.data += 0.3 * p.std() * torch.randn_like(p)
    return [first, other], data


def zipped_of(models: list[nn.Module], data: list[list[Tensor]], share: Any = 1.0, **options: Any) -> tz.ZippedModel:
    tasks = [tz.Task(name, *each) for name, *each in zip("ab", models, data, strict=True)]
    return tz.zip(tasks, share=share, progress=False, **options)


def errors(zipped: tz.ZippedModel, models: list[nn.Module], data: list[list[Tensor]]) -> list[float]:
    """Squared distances to the original answers, relative to their variance."""
    found = []
    for name, model, (x, *_) in zip("ab", models, data, strict=True):
        wanted = model(x).detach()
        found.append(float((zipped[name](x).detach() - wanted).square().mean() / wanted.var()))
    return found


@pytest.mark.parametrize("make", KINDS)
def test_networks_that_differ_in_scale_and_shift_of_their_units_become_one(make: Callable[[int], nn.Module]) -> None:
    """No activation here commutes with scaling, so that nothing but a scale of each task's own can do it."""
    first, data = pair(make)
    other = copy.deepcopy(first[0])
    layers = [layer for layer in other if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv1d))][:-1]
    for layer in layers:
        scale = torch.rand(len(layer.weight), dtype=DOUBLE) * 2 + 0.5
        layer.weight.data *= scale.view(-1, *(1,) * (layer.weight.dim() - 1))
        layer.bias.data += torch.randn_like(scale)
    models = [first[0], other]
    common = errors(zipped_of(models, data, own_scale=False), models, data)
    # Nearly: with damping, and pairs found by how much two units differ that are then scaled.
    own = zipped_of(models, data, damping=0.0, balance=0.5)
    assert sum(errors(own, models, data)) < 0.1 * sum(common)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_errors_are_smaller(make: Callable[[int], nn.Module], share: float) -> None:
    """Of networks whose units do nearly the same."""
    found = {True: 0.0, False: 0.0}
    for _ in range(3):
        models, data = related(make)
        for own in found:
            found[own] += sum(errors(zipped_of(models, data, share, own_scale=own), models, data))
    assert found[True] < found[False]


def test_a_scale_and_a_shift_per_shared_unit_and_task() -> None:
    models, data = pair(smooth)
    own, common = (zipped_of(models, data, 0.5, own_scale=each) for each in (None, False))
    shared = sum(layer.shared for layer in own.history.layers)
    assert shared == sum(layer.shared for layer in common.history.layers) == 8
    # Biases of shared units are no longer common, and each task multiplies by one number more.
    assert own.parameter_count() == common.parameter_count() + shared + 2 * shared
    assert own.history.settings["own_scale"] and not common.history.settings["own_scale"]
    for name in "ab":
        specs = [spec_of(blocks) for blocks in installed(own[name]).values()]
        assert [row.scale for spec in specs for row in spec.rows] == [f"a+b:{name}", None] * 2


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_saved_and_made_plain_they_answer_alike(make: Callable[[int], nn.Module], share: float, tmp_path: Path) -> None:
    models, data = pair(make)
    zipped = zipped_of(models, data, share)
    zipped.save(tmp_path / "joint.safetensors")
    fresh = {name: copy.deepcopy(model) for name, model in zip("ab", models, strict=True)}
    loaded = tz.load(tmp_path / "joint.safetensors", fresh)
    for name, (x, *_) in zip("ab", data, strict=True):
        assert torch.equal(loaded[name](x), zipped[name](x))
        torch.testing.assert_close(zipped.materialize(name)(x), zipped[name](x))
        torch.testing.assert_close(copy.deepcopy(zipped)[name](x[0:1]), zipped[name](x)[0:1])
    together = zipped({name: x for name, (x, *_) in zip("ab", data, strict=True)})
    for name, (x, *_) in zip("ab", data, strict=True):
        torch.testing.assert_close(together[name], zipped[name](x))


def test_a_single_sample_without_a_batch() -> None:
    models, data = pair(images)
    zipped = zipped_of(models, data, 0.5)
    convolution, x = zipped["a"][0], data[0][0]
    torch.testing.assert_close(convolution(x[0]), convolution(x)[0])
    torch.testing.assert_close(convolution(x), nn.functional.conv2d(x, convolution.weight, convolution.bias))


def test_autocast_keeps_its_type() -> None:
    models, data = pair(smooth)
    zipped = zipped_of([model.float() for model in models], [[x.float() for x in each] for each in data])
    with torch.autocast("cpu", torch.bfloat16):
        assert zipped["a"][0](data[0][0].float()).dtype == torch.bfloat16


def test_scales_and_shifts_learn() -> None:
    models, data = pair(smooth)
    zipped = zipped_of(models, data)
    tasks = [tz.Task(name, *each) for name, *each in zip("ab", models, data, strict=True)]
    before = {name: p.detach().clone() for name, p in zipped.named_parameters()}
    zipped.train()
    sum(zipped[task.name](task.data[0]).square().mean() for task in tasks).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in zipped.parameters())
    tz.retrain(zipped, tasks, loss="distill", steps=20, progress=False)
    after = dict(zipped.named_parameters())
    for name in ("tasks.a.0.weight_blocks.a+b:a", "tasks.b.2.weight_blocks.a+b:b", "tasks.b.0.bias"):
        assert not torch.equal(after[name], before[name])


def test_a_layer_of_the_users_own_has_none() -> None:
    models = [smooth(classes, hidden=Subclassed).eval() for classes in (3, 4)]
    zipped = zipped_of(models, [[torch.randn(40, 5, dtype=DOUBLE)] for _ in models])
    assert not [row for b in installed(zipped["a"]).values() for row in spec_of(b).rows if row.scale]
    assert any("0.bias" in name for name in installed(zipped["a"]))


def test_without_biases_there_is_a_scale_alone() -> None:
    models = [smooth(classes, bias=False).eval() for classes in (3, 4)]
    zipped = zipped_of(models, [[torch.randn(40, 5, dtype=DOUBLE)] for _ in models])
    assert zipped["a"][0].bias is None
    assert [row.scale for b in installed(zipped["a"]).values() for row in spec_of(b).rows] == ["a+b:a"] * 2


@pytest.mark.parametrize("options", [{"cross": False}, {"batch_norm": "fold"}, {"compensate": False}])
def test_tasks_with_a_common_trunk_have_none(options: dict[str, Any]) -> None:
    models, data = pair(smooth)
    zipped = zipped_of(models, data, **options)
    assert not zipped.history.settings["own_scale"]
    assert all(layer.shared for layer in zipped.history.layers[:-1])
    assert not [row for b in installed(zipped["a"]).values() for row in spec_of(b).rows if row.scale]


def test_both_at_once_are_refused() -> None:
    models, data = pair(smooth)
    with pytest.raises(InputError, match=r"own_scale=True .* cross=False"):
        zipped_of(models, data, cross=False, own_scale=True)


def test_blocks_of_eight_bits() -> None:
    """A joint network whose blocks torchao has quantised runs for any batch, and can be made plain."""
    torchao = pytest.importorskip("torchao.quantization")
    nets = [nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 3)) for _ in "ab"]
    data = [[torch.randn(200, 32)] for _ in nets]
    zipped = zipped_of(nets, data)
    before = {name: zipped[name](data[0][0]).detach() for name in "ab"}
    for k in (0, 2):
        block = nn.Linear(*reversed(zipped["a"][k].weight_blocks.get_parameter("a+b").shape), bias=False)
        block.weight = zipped["a"][k].weight_blocks.get_parameter("a+b")
        torchao.quantize_(block, torchao.Int8WeightOnlyConfig())
        for name in "ab":
            zipped[name][k].weight_blocks._parameters["a+b"] = block.weight
    for name in "ab":
        for x in (data[0][0], data[0][0][:1]):
            assert (zipped[name](x) - before[name][: len(x)]).abs().max() < 0.05 * before[name].abs().max()
        assert (zipped.materialize(name)(x) - zipped[name](x)).abs().max() < 1e-2 * before[name].abs().max()


def test_a_network_and_its_copy_in_half_precision() -> None:
    nets = [smooth(3).to(torch.bfloat16) for _ in "a"]
    models: list[nn.Module] = [nets[0], copy.deepcopy(nets[0])]
    data = [[torch.randn(200, 5).to(torch.bfloat16)] for _ in models]
    zipped = zipped_of(models, data)
    for task in "ab":
        for k in (0, 2):
            assert torch.equal(zipped[task][k].weight.abs().sum(), models[0][k].weight.abs().sum())


def test_three_tasks_count_by_what_each_of_them_matters() -> None:
    """What has joined counts by its owners: an unimportant one gets no say by being merged."""
    h, w = torch.ones(1, 1, dtype=DOUBLE), [torch.full((1, 1), float(v), dtype=DOUBLE) for v in (0, 1, 1)]
    importance = [torch.tensor([v], dtype=DOUBLE) for v in (1.0, 1 / 32, 1.0)]
    at_once = merge_weights(w, [h, h, h], None, [each.square() for each in importance])
    joint = merge_weights(w[:2], [h, h], None, [each.square() for each in importance[:2]])
    together = torch.stack(importance[:2]).square().mean(0)
    stepwise = merge_weights([joint, w[2]], [2 * h, h], None, [together, importance[2].square()])
    torch.testing.assert_close(stepwise, at_once, rtol=0, atol=2e-3)


def test_a_budget_where_units_read_too_little_to_share() -> None:
    """Units of one weight with scales of their own are more than units apart."""
    nets = [nn.Sequential(nn.Linear(1, 40), nn.GELU(), nn.Linear(40, c)) for c in (2, 3)]
    data = [[torch.randn(100, 1)] for _ in nets]
    apart = sum(p.numel() for net in nets for p in net.parameters())
    assert zipped_of(nets, data, 1.0).parameter_count() > apart
    assert zipped_of(nets, data, tz.Budget(1.0)).parameter_count() == apart
