"""Batch-norm that is folded into the layer before it, and batch-norm behind layers that stay private."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import taskzip as tz

DOUBLE = torch.float64


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def images(samples: int = 20) -> Tensor:
    return some(samples, 2, 6, 6) + 0.5


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """With statistics as of some training, scales of both signs, none of them near 0, and no dead units."""
    model.to(DOUBLE).train()
    with torch.no_grad():
        for _ in range(10):
            model(x + 0.3 * torch.randn_like(x))
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5).mul_(torch.randn_like(module.weight).sign())
                module.bias.uniform_(0.5, 1.5)
    return model.eval()


def run_zip(models: Sequence[nn.Module], data: Sequence[Tensor], **options: Any) -> tz.ZippedModel:
    return tz.zip(tasks_of(models, data), **{"batch_norm": "fold", "share": 1.0, "progress": False, **options})


def tasks_of(models: Sequence[nn.Module], data: Sequence[Tensor]) -> list[tz.Task]:
    return [tz.Task("abc"[i], m, list(x.split(8))) for i, (m, x) in enumerate(zip(models, data, strict=True))]


def assert_close(given: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    assert given.shape == wanted.shape
    assert (given - wanted).abs().max() <= tolerance * wanted.abs().max()


def norms_in(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def blocks_in(model: nn.Module) -> set[str]:
    """The names of all blocks: "a+b" is common to both tasks."""
    return {name.rpartition(".")[2] for name, _ in model.named_parameters() if "_blocks." in name}


class Net(nn.Module):
    """A convolution and a linear layer with batch-norm, and an output layer."""

    def __init__(
        self, kernels: int = 4, units: int = 5, *, bias: bool = False, affine: bool = True, norm: type = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, kernels, 3, stride=2, padding=1, bias=bias)
        self.norm = norm(kernels, affine=affine)
        self.linear = nn.Linear(9 * kernels, units, bias=bias)
        self.norm1 = nn.BatchNorm1d(units, affine=affine)
        self.out = nn.Linear(units, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.out(self.norm1(self.linear(x.flatten(1))).relu())


def pair(make: Callable[[], nn.Module], other: Callable[[], nn.Module] | None = None) -> tuple[list[nn.Module], Tensor]:
    x = images()
    return [trained(make(), x), trained((other or make)(), x)], x


# --- what is folded gives the same outputs --------------------------------------------------------------------------

FOLDED: dict[str, Callable[[], nn.Module]] = {
    "without biases": Net,
    "with biases": lambda: Net(bias=True),
    "without affine": lambda: Net(affine=False),
}


@pytest.mark.parametrize("kind", FOLDED)
def test_nothing_shared_changes_nothing_and_batch_norm_is_gone(kind: str) -> None:
    models, x = pair(FOLDED[kind])
    zipped = run_zip(models, [x, x], share=0.0)
    fresh = images(7)
    for name, model in zip("ab", models, strict=True):
        for inputs in (x, fresh):
            assert_close(zipped[name](inputs), model(inputs))
        assert norms_in(zipped[name]) == []
        assert zipped[name].conv.bias is not None
    assert list(zipped.buffers()) == []
    assert zipped.history.settings["batch_norm"] == "fold"


@pytest.mark.parametrize("kind", ["without biases", "with biases"])
def test_full_sharing_leaves_nothing_private_but_the_output_layer(kind: str) -> None:
    models, x = pair(FOLDED[kind])
    zipped = run_zip(models, [x, images()])
    assert norms_in(zipped) == []
    assert blocks_in(zipped) == {"a+b"}
    out = sum(p.numel() for model in models for p in model.out.parameters())
    assert zipped.parameter_count() - zipped.shared_parameter_count() == out
    assert zipped.parameter_count(["a"]) == zipped.shared_parameter_count() + out / 2
    assert [r.shared for r in zipped.history.layers] == [4, 5, 0]


def test_a_network_with_batch_norm_shares_all_of_a_layer_with_one_that_has_none() -> None:

    class Plain(Net):
        def __init__(self) -> None:
            super().__init__(bias=True)
            self.norm, self.norm1 = nn.Identity(), nn.Identity()

    models, x = pair(Net, Plain)
    zipped = run_zip(models, [x, x])
    assert blocks_in(zipped) == {"a+b"}
    assert zipped.history.settings["folded"] == {"a": [("conv", "norm"), ("linear", "norm1")], "b": []}


def permuted(model: Net) -> Net:
    """The same function: units in another order, and kernels of other sizes and signs, which batch-norm takes off."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer, norm, reader, run in (
            (model.conv, model.norm, model.linear, 9),
            (model.linear, model.norm1, model.out, 1),
        ):
            order = torch.randperm(len(layer.weight))
            factor = (0.5 + torch.rand(len(order), dtype=DOUBLE)) * some(len(order)).sign()
            for p in [*layer.parameters(), *norm.parameters(), norm.running_mean, norm.running_var]:
                p.copy_(p[order])
            for p in layer.parameters():
                p.mul_(factor.reshape(-1, *[1] * (p.dim() - 1)))
            norm.running_mean.mul_(factor)
            norm.running_var.add_(norm.eps).mul_(factor**2).sub_(norm.eps)
            if norm.weight is not None:
                norm.weight.mul_(factor.sign())
            columns = (order[:, None] * run + torch.arange(run)).ravel()
            reader.weight.copy_(reader.weight[:, columns])
    return model


@pytest.mark.parametrize("bias, compensate", [(False, True), (True, False)])
def test_a_permuted_copy_is_found_whatever_the_scales(bias: bool, compensate: bool) -> None:
    x = images(40)
    model = trained(Net(bias=bias), x)
    other = permuted(model)
    assert_close(other(x), model(x), 1e-12)
    zipped = run_zip([model, other], [x, x], compensate=compensate, max_rows=None)
    for record in zipped.history.layers[:-1]:
        assert record.shared == min(record.units)
        assert record.cost < 1e-10
    for name in "ab":
        assert_close(zipped[name](x), model(x), 1e-7)
        assert_close(zipped[name](2 * x - 1), model(2 * x - 1), 1e-7)


def test_units_of_opposite_sign_are_not_taken_for_the_same() -> None:
    """Equal kernels, but one scale is negative: relu makes different units of them."""
    x = images(40)
    model = trained(Net(), x)
    with torch.no_grad():
        model.norm.weight.abs_()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.norm.weight[0] *= -1
    zipped = run_zip([model, other], [x, x], share=tz.Threshold({"conv": 1e-9}), compensate=False)
    assert zipped.history.layers[0].shared == 3


def test_zeros_of_a_pruned_network_stay_zeros() -> None:
    models, x = pair(Net)
    with torch.no_grad():
        for model in models:
            model.conv.weight[:, 0] = 0
            model.linear.weight[:, ::2] = 0
    zipped = run_zip(models, [x, x])
    for name in "ab":
        assert not zipped[name].conv.weight[:, 0].any()
    assert zipped.connection_count() < sum(zipped.history.settings["connections"].values())
    assert "connections apart" in zipped.summary()


# --- what is not folded stays private -------------------------------------------------------------------------------


class Concatenated(Net):
    """Batch-norm over what two convolutions answer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 2, 3, 2, 1), nn.Conv2d(2, 2, 3, 2, 1)
        del self.conv

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.cat([self.left(x), self.right(x)], 1)).relu()
        return self.out(self.norm1(self.linear(x.flatten(1))).relu())


class Twice(Net):
    """One batch-norm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Conv2d(2, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu() + self.norm(self.more(x)).relu()
        return self.out(self.norm1(self.linear(x.flatten(1))).relu())


class ReadTwice(Net):
    """What the convolution answers is also read past its batch-norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.norm(x).relu() + x
        return self.out(self.norm1(self.linear(x.flatten(1))).relu())


class CalledTwice(Net):
    """One convolution that runs twice, with batch-norm behind one of the calls only."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu() + self.conv(x + 1).relu()
        return self.out(self.norm1(self.linear(x.flatten(1))).relu())


class Clamped(nn.BatchNorm2d):
    """Does more than torch's own, but seldom: one batch may not tell."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=1e6)


class Unchanged(nn.BatchNorm2d):
    """A subclass with no forward of its own is as good as torch's."""


PRIVATE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "behind a concatenation": (Concatenated, "read by relu"),
    "used twice": (Twice, "used more than once"),
    "read past": (ReadTwice, "read by relu"),
    "behind one of two calls": (CalledTwice, "read by relu"),
    "own forward": (lambda: Net(norm=Clamped), "read by clamp"),
}


@pytest.mark.parametrize("kind", PRIVATE)
def test_what_does_not_directly_follow_a_layer_stays_private(kind: str, tmp_path: Path) -> None:
    """It is said which, and why. The other one is folded; merged with itself, the network is what it was."""
    make, why = PRIVATE[kind]
    models, x = pair(make)
    model = models[0]
    with pytest.warns(tz.TaskzipWarning, match=rf"fold': task '[ab]' keeps batch-norm private: norm \({why}\)"):
        zipped = run_zip([model, copy.deepcopy(model)], [x, x])
    assert zipped.history.settings["unfolded"] == {"a": {"norm": why}, "b": {"norm": why}}
    assert f"b keeps batch-norm private: norm ({why})." in zipped.summary()
    assert zipped.history.settings["folded"] == {"a": [("linear", "norm1")], "b": [("linear", "norm1")]}
    for name in "ab":
        assert norms_in(zipped[name]) == ["norm"]
        assert_close(zipped[name](x), model(x), 1e-8)
    assert not set(zipped["a"].norm.parameters()) & set(zipped["b"].norm.parameters())

    zipped.save(tmp_path / "joint.safetensors")
    loaded = tz.load(tmp_path / "joint.safetensors", {name: make().to(DOUBLE) for name in "ab"})
    assert torch.equal(loaded["b"](x), zipped["b"](x))
    assert loaded.summary() == zipped.summary()


def test_of_two_different_networks_nothing_shared_changes_nothing() -> None:
    models, x = pair(Twice, lambda: Net(norm=Unchanged))
    with pytest.warns(tz.TaskzipWarning, match="'a' keeps batch-norm private"):
        zipped = run_zip(models, [x, x], share=0.0, layers={"conv": "conv", "linear": "linear", "out": "out"})
    for name, model in zip("ab", models, strict=True):
        assert_close(zipped[name](x), model(x))
    assert norms_in(zipped["a"]) == ["norm"]
    assert norms_in(zipped["b"]) == []


class Alias(Net):
    """Its batch-norm has two names and is called by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.conv(x)).relu()
        return self.out(self.norm1(self.linear(x.flatten(1))).relu())


class Tied(Net):
    """The weights of the linear layer are also read past its batch-norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().flatten(1)
        hidden = self.norm1(self.linear(x)).relu()
        return self.out(hidden) + F.linear(hidden, self.linear.weight.t()).sum(1, keepdim=True)


class Hooked(Net):
    """A hook changes what its batch-norm answers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.register_forward_hook(doubled)


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


class Functional(Net):
    """Its batch-norm holds tensors, but is never called."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        x = F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight, n.bias, False).relu()
        return self.out(self.norm1(self.linear(x.flatten(1))).relu())


@pytest.mark.parametrize(
    "make",
    [
        Alias,
        Tied,
        Hooked,
        Functional,
    ],
)
def test_where_folding_would_change_the_outputs_the_error_says_what_to_do(make: type[Net]) -> None:
    """And the models are unchanged."""
    models, x = pair(make)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    with pytest.raises(tz.GraphError, match=r"task 'a': .*zip with batch_norm='private'"):
        run_zip(models, [x, x])
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# --- the caller's models, checkpoints, plain copies -------------------------------------------------------------------


def test_the_models_are_left_exactly_as_they_were() -> None:
    models, x = pair(Net)
    models[0].train()
    models[1].conv.weight.requires_grad_(False)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    modules = [dict(model.named_modules()) for model in models]
    zipped = run_zip(models, [x, x])
    tz.retrain(zipped, tasks_of(models, [x, x]), steps=2, loss="distill", progress=False)
    for model, state, known in zip(models, before, modules, strict=True):
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert dict(model.named_modules()) == known
        assert model.conv.bias is None
    assert models[0].training and models[0].norm.training and not models[1].training
    assert not models[1].conv.weight.requires_grad
    mine = {p.data_ptr() for m in models for p in (*m.parameters(), *m.buffers())}
    assert not mine & {p.data_ptr() for p in zipped.parameters()}


def test_loads_bit_identical_into_networks_of_the_original_class(tmp_path: Path) -> None:
    models, x = pair(lambda: Net(4, 5), lambda: Net(5, 6, bias=True))
    zipped = run_zip(models, [x, images()], share=0.6, own_scale=False)
    zipped.save(tmp_path / "joint.safetensors")
    fresh = {"a": Net(4, 5).to(DOUBLE), "b": Net(5, 6, bias=True).to(DOUBLE)}
    before = {name: copy.deepcopy(model.state_dict()) for name, model in fresh.items()}
    loaded = tz.load(tmp_path / "joint.safetensors", fresh)
    for name in "ab":
        for inputs in (x, x[:1]):
            assert torch.equal(loaded[name](inputs), zipped[name](inputs))
        assert list(fresh[name].state_dict()) == list(before[name])
        assert all(torch.equal(v, before[name][k]) for k, v in fresh[name].state_dict().items())
        assert norms_in(fresh[name]) == ["norm", "norm1"]
    assert loaded.parameter_count() == zipped.parameter_count()
    assert loaded.summary() == zipped.summary()
    assert all(p.requires_grad for p in loaded.parameters())

    with torch.no_grad():  # so that there is something to learn
        for p in loaded.parameters():
            p.add_(0.2 * p.std() * torch.randn_like(p))
    tz.retrain(loaded, tasks_of(models, [x, x]), steps=1, loss="distill", batch_norm="update", progress=False)
    loaded.save(tmp_path / "again.safetensors")
    again = tz.load(tmp_path / "again.safetensors", fresh)
    assert torch.equal(again["a"](x), loaded["a"](x))
    assert not torch.equal(again["a"](x), zipped["a"](x))


class Nested(Net):
    """Its convolution is inside of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(self.conv)


class Missing(Net):
    def __init__(self) -> None:
        super().__init__()
        del self.norm


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    models, x = pair(Net)
    path = tmp_path_factory.mktemp("folded") / "joint.safetensors"
    run_zip(models, [x, x]).save(path)
    return path


@pytest.mark.parametrize(
    "make",
    [
        lambda: Net(kernels=6),
        lambda: Net(affine=False, units=6),
        Missing,
        Twice,
        lambda: nn.Linear(2, 3),
        nn.Identity,
        Nested,
    ],
)
def test_a_network_of_another_class_is_one_clear_error(make: Callable[[], nn.Module], path: Path) -> None:
    other = make().to(DOUBLE)
    state = copy.deepcopy(other.state_dict())
    with pytest.raises(tz.CheckpointError, match=r"task 'b': the network given .* does not fit the one saved .*Net\)"):
        tz.load(path, {"a": Net().to(DOUBLE), "b": other})
    assert list(other.state_dict()) == list(state)


def test_materialize_gives_plain_modules_and_what_is_frozen_stays_frozen() -> None:
    models, x = pair(Net)
    for model in models:
        model.conv.requires_grad_(False)
    zipped = run_zip(models, [x, x], share=0.5)
    for name in "ab":
        plain = zipped.materialize(name)
        assert torch.equal(plain(x), zipped[name](x))
        assert type(plain) is Net
        assert {type(module) for module in plain.modules()} == {Net, nn.Conv2d, nn.Linear, nn.Identity}
        assert sorted(plain.state_dict()) == sorted(
            f"{n}.{w}" for n in ("conv", "linear", "out") for w in ("weight", "bias")
        )
        assert all(type(p) is nn.Parameter and p.is_leaf for p in plain.parameters())
        assert {n for n, p in plain.named_parameters() if not p.requires_grad} == {"conv.weight", "conv.bias"}
    assert {name.split(".")[2] for name, p in zipped.named_parameters() if not p.requires_grad} == {"conv"}


@pytest.mark.parametrize("value", ["folded", True, None, "FOLD", 1])
def test_an_unknown_value(value: Any) -> None:
    models, x = pair(Net)
    with pytest.raises(tz.InputError, match=f"batch_norm={value!r} is not known: choose one of 'private', 'fold'"):
        run_zip(models, [x, x], batch_norm=value)


class Line(nn.Module):
    """Convolutions along one axis, with a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(1, 4, 3, padding=1, bias=False), nn.BatchNorm1d(4)
        self.second, self.norm2 = nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = (x + self.norm2(self.second(x))).relu()
        return self.out(x.mean(2))


def test_batch_norm_in_a_residual_stream() -> None:
    x = some(20, 1, 6)
    model = trained(Line(), x)
    zipped = run_zip([model, copy.deepcopy(model)], [x, x])
    for name in "ab":
        assert_close(zipped[name](x), model(x), 1e-8)
    assert norms_in(zipped) == []
    assert blocks_in(zipped) == {"a+b"}


# --- batch-norm behind layers that stay private follows what changed before it ----------------------------------------


class Separable(nn.Module):
    """1x1, depthwise, 1x1, depthwise: as in a MobileNet."""

    def __init__(self, width: int = 6, groups: int | None = None, *, bias: bool = False) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, width, 1, bias=False), nn.BatchNorm2d(width)
        self.deep = nn.Conv2d(width, width, 3, padding=1, groups=groups or width, bias=bias)
        self.deep_norm = nn.BatchNorm2d(width)
        self.second, self.norm2 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.deep2 = nn.Conv2d(width, 2 * width, 3, stride=2, groups=groups or width, bias=bias)
        self.deep2_norm = nn.BatchNorm2d(2 * width, eps=1e-2)
        self.out = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.deep_norm(self.deep(x)).relu()
        x = self.norm2(self.second(x)).relu()
        x = self.deep2_norm(self.deep2(x)).relu()
        return self.out(x.mean((2, 3)))


def read_by(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """What a module is given, one row per sample and place."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0].movedim(1, -1).flatten(0, -2)


def order_of(norm: _BatchNorm, original: _BatchNorm) -> Tensor:
    """Which of the original's units stands where: however large units are, their shift is as large as their scale."""
    found = ((norm.bias / norm.weight)[:, None] - original.bias / original.weight).abs().argmin(1)
    assert len(found.unique()) == len(found)
    return found


def check_follows(network: nn.Module, original: nn.Module, name: str, x: Tensor) -> bool:
    """Mean and spread changed relatively, as what the batch-norm reads did; whether anything changed."""
    norm, before = network.get_submodule(name), original.get_submodule(name)
    assert isinstance(norm, _BatchNorm) and isinstance(before, _BatchNorm)
    order = order_of(norm, before)
    new, old = read_by(network, name, x), read_by(original, name, x)[:, order]
    assert torch.cat([old.var(0), new.var(0)]).min() > 1e-6
    ratio = new.var(0, correction=0) / old.var(0, correction=0)
    mean = new.mean(0) - (old.mean(0) - before.running_mean[order]) * ratio.sqrt()
    assert_close(norm.running_mean, mean, 1e-8)
    gain, gain_before = (each.weight / each.bias / (each.running_var + each.eps).sqrt() for each in (norm, before))
    assert_close(gain, gain_before[order] / ratio.sqrt(), 1e-8)  # relative to the shift: units may be of another size
    answers = (new - norm.running_mean) * gain, (old - before.running_mean[order]) * gain_before[order]
    for moment in (lambda y: y.mean(0), lambda y: y.std(0)):
        assert_close(moment(answers[0]), moment(answers[1]), 1e-8)
    return not torch.allclose(ratio, torch.ones_like(ratio), rtol=1e-3)


@pytest.mark.parametrize(
    "groups, bias, options",
    [
        (None, False, {"share": 1.0}),
        (None, True, {"share": 0.5, "compensate": False}),
        (2, True, {"share": 0.7, "max_rows": 30}),
    ],
)
def test_statistics_behind_a_grouped_convolution_follow(
    groups: int | None, bias: bool, options: dict[str, Any]
) -> None:
    data = [images(), images() - 0.5]
    models = [trained(Separable(groups=groups, bias=bias), x) for x in data]
    zipped = run_zip(models, data, batch_norm="private", **options)
    assert zipped.history.layers[0].shared > 0
    for name, model, x in zip("ab", models, data, strict=True):
        assert check_follows(zipped[name], model, "deep_norm", x)
        assert check_follows(zipped[name], model, "deep2_norm", x)


class Channels(nn.Module):
    """A grouped convolution reads the image itself, after another layer has run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5)
        self.own, self.own_norm = nn.Conv2d(2, 6, 3, groups=2), nn.BatchNorm2d(6)
        self.deep, self.deep_norm = nn.Conv2d(5, 5, 2, groups=5), nn.BatchNorm2d(5)
        self.out = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, own = self.norm(self.first(x)).relu(), self.own_norm(self.own(x)).relu()
        deep = self.deep_norm(self.deep(first)).relu()
        return self.out(torch.cat([deep.mean((2, 3)), own.mean((2, 3))], 1))


def test_statistics_stay_where_nothing_before_changed() -> None:
    """Exactly, though the network has changed elsewhere."""
    data = [images(), images()]
    models = [trained(Channels(), x) for x in data]
    zipped = run_zip(models, data, batch_norm="private")
    assert zipped.history.layers[0].shared == 5
    for name, model, x in zip("ab", models, data, strict=True):
        assert check_follows(zipped[name], model, "deep_norm", x)
        now, before = zipped[name].own_norm, model.own_norm
        order = order_of(now, before)
        assert torch.equal(now.running_mean, before.running_mean[order])
        assert torch.equal(now.running_var, before.running_var[order])


class Deeper(nn.Module):
    """One layer more than `Net`, which no other network has."""

    def __init__(self, *, more: bool) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.more, self.norm = (nn.Linear(8, 7), nn.BatchNorm1d(7)) if more else (nn.Identity(), nn.Identity())
        self.out = nn.Linear(7 if more else 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.more(self.first(x).relu())).relu())


@pytest.mark.parametrize("compensate", [False, True])
def test_statistics_behind_a_layer_without_a_partner_follow(compensate: bool) -> None:
    data = [some(40, 5), some(40, 5) + 1]
    models = [trained(Deeper(more=True), data[0]), trained(Deeper(more=False), data[1])]
    zipped = run_zip(models, data, batch_norm="private", compensate=compensate)
    assert [r.shared for r in zipped.history.layers] == [8, 0, 0]
    check_follows(zipped["a"], models[0], "norm", data[0])
    if not compensate:
        assert check_follows(zipped["a"], models[0], "norm", data[0])


def test_grouped_convolutions_are_folded_too() -> None:
    x = images()
    model = trained(Separable(), x)
    zipped = run_zip([model, copy.deepcopy(model)], [x, x])
    for name in "ab":
        assert_close(zipped[name](x), model(x), 1e-8)
    assert norms_in(zipped) == []
