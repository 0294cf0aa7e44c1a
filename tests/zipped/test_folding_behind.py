"""Batch-norm that does not directly follow a layer becomes part of what reads it, or it is said why it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import taskzip as tz
from taskzip.graph import analyse
from taskzip.zipped.folding import fold, foldable, listed

DOUBLE = torch.float64
PLACES = 4 * 5 * 5
"""Of the four channels that the first convolution makes of an image of 2 x 7 x 7."""


def trained(model: nn.Module, x: Tensor, *, positive: bool = False) -> nn.Module:
    """With statistics as of some training, and scales of both signs if they need not be positive."""
    model.to(DOUBLE).train()
    with torch.no_grad():
        for _ in range(5):
            model(x + 0.3 * torch.randn_like(x))
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.weight.mul_(1 if positive else torch.randn_like(module.weight).sign())
                module.bias.uniform_(0.5, 1.5)
    return model.eval()


def images() -> Tensor:
    return torch.randn(6, 2, 7, 7, dtype=DOUBLE) + 0.5


class Head(nn.Module):
    """Convolution, relu, batch-norm, and whatever comes then."""

    def __init__(self, then: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.then = then
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, self.norm(self.conv(x).relu()))


def out(places: int = PLACES) -> nn.Linear:
    return nn.Linear(places, 3)


def read(*names: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """These layers one after another, the last one flattened."""

    def then(net: nn.Module, x: Tensor) -> Tensor:
        for name in names[:-1]:
            x = getattr(net, name)(x)
        return getattr(net, names[-1])(x.flatten(1))

    return then


def by_conv(**options: Any) -> Head:
    conv = nn.Conv2d(4, 8, options.pop("kernel", 3), **options)
    shape = conv(torch.zeros(1, 4, 5, 5))[0].numel()
    return Head(lambda net, x: net.out(net.read(x).relu().flatten(1)), read=conv, out=out(shape))


def two_readers(net: nn.Module, x: Tensor) -> Tensor:
    return net.out((net.left(x).relu() + net.right(x).relu()).flatten(1)) + net.whole(x.flatten(1))


def beside_others(net: nn.Module, x: Tensor) -> Tensor:
    """Among inputs that another batch-norm gives, and inputs that none does."""
    more = net.more(x)
    return net.out(net.read(torch.cat([net.own(more.relu()), x, more.tanh(), x], 1)).flatten(1))


def halves(net: nn.Module, x: Tensor) -> Tensor:
    one, other = x.mean((2, 3)).chunk(2, 1)
    return net.left(one) + net.right(other)


def turned(net: nn.Module, x: Tensor) -> Tensor:
    """A linear layer at every place."""
    return net.out(net.read(x.flatten(2).transpose(1, 2)).relu().mean(1))


def pooled_by(pool: Callable[[Tensor], Tensor], places: int, *, positive: bool = False) -> tuple[Head, bool]:
    return Head(lambda net, x: net.out(pool(x).flatten(1)), out=out(4 * places)), positive


class Dense(nn.Module):
    """Linear layers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(98, 6), nn.BatchNorm1d(6), nn.Dropout()
        self.second, self.norm2 = nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5, affine=False)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.first(x.flatten(1)).relu()))
        return self.out(self.norm2(self.second(x).tanh()))


class First(nn.Module):
    """Batch-norm stands before all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.out = nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3), out()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(self.norm(x)).relu().flatten(1))


class Volumes(nn.Module):
    """Along one axis, then along three."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Conv1d(4, 8, 2)
        self.norm2, self.three, self.out = nn.BatchNorm3d(1), nn.Conv3d(1, 2, 2), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.norm(self.one(x.flatten(2)).relu())).relu()
        return self.out(self.three(self.norm2(x[:, :, :27].reshape(len(x), 1, 8, 3, 9))).flatten(1))


class Chain(nn.Module):
    """The layer that takes the first batch-norm over has one directly behind it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.next, self.norm2, self.out = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), out(36)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm2(self.next(self.norm(self.conv(x).relu()))).relu().flatten(1))


def unshifted() -> Head:
    """Zeros from outside do not matter where nothing is added."""
    net = by_conv(padding=1)
    net.norm = nn.BatchNorm2d(4, affine=False)
    return net


TAKEN: dict[str, Callable[[], nn.Module | tuple[nn.Module, bool]]] = {
    "a convolution": by_conv,
    "without a bias": partial(by_conv, bias=False),
    "strided, dilated": partial(by_conv, stride=2, dilation=2),
    "padding by name, none": partial(by_conv, padding="valid"),
    "padding by name, one place": partial(by_conv, padding="same", kernel=1),
    "padded by reflection": partial(by_conv, padding=1, padding_mode="reflect"),
    "padded around": partial(by_conv, padding=1, padding_mode="circular"),
    "in groups": partial(by_conv, groups=2),
    "channel by channel": partial(by_conv, groups=4),
    "a linear layer": lambda: Head(read("out"), out=out()),
    "a linear layer at every place": lambda: Head(turned, read=nn.Linear(4, 5), out=nn.Linear(5, 3)),
    "several": lambda: Head(
        two_readers, left=nn.Conv2d(4, 2, 3), right=nn.Conv2d(4, 2, 3), out=out(18), whole=out(PLACES)
    ),
    "beside others": lambda: Head(
        beside_others, more=nn.Conv2d(4, 3, 1), own=nn.BatchNorm2d(3), read=nn.Conv2d(14, 2, 2), out=out(32)
    ),
    "halves": lambda: Head(halves, left=nn.Linear(2, 3), right=nn.Linear(2, 3)),
    "average": lambda: pooled_by(lambda x: F.avg_pool2d(x, 2, ceil_mode=True), 9),
    "average that counts no zeros": lambda: pooled_by(lambda x: F.avg_pool2d(x, 3, 2, 1, False, False), 9),
    "average of all places": lambda: pooled_by(nn.AdaptiveAvgPool2d(2), 4),
    "mean": lambda: pooled_by(lambda x: x.mean((2, 3), keepdim=True), 1),
    "largest": lambda: pooled_by(lambda x: F.max_pool2d(x, 3, 2, padding=1), 9, positive=True),
    "largest, with its place": lambda: pooled_by(lambda x: F.max_pool2d_with_indices(x, 2)[0], 4, positive=True),
    "largest of all places": lambda: pooled_by(nn.AdaptiveMaxPool2d(2), 4, positive=True),
    "largest and least": lambda: pooled_by(lambda x: torch.cat([x.amax(3), x.amin(2)], 2), 10, positive=True),
    "resized": lambda: pooled_by(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), 100),
    "dropout and linear layers": Dense,
    "of the input": First,
    "along one axis and three": Volumes,
    "into a layer with its own": Chain,
    "without a shift, padded": unshifted,
}


@pytest.mark.parametrize("kind", TAKEN)
def test_layers_behind_take_it_over(kind: str) -> None:
    """The network computes what it did, without batch-norm."""
    x, made = images(), TAKEN[kind]()
    model, positive = made if isinstance(made, tuple) else (made, False)
    model.to(DOUBLE)(x)
    model = trained(model, x, positive=positive)
    if kind == "without a shift, padded":
        model.norm.running_mean.zero_()
    wanted = model(torch.cat([x, 2 * x - 1]))
    folds, private = foldable(model, analyse(model, x, lambda net, batch: net(batch)))
    assert private == {}
    fold(model, folds)
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())
    assert (model(torch.cat([x, 2 * x - 1])) - wanted).abs().max() < 1e-12 * wanted.abs().max()


# --- what cannot be taken over ----------------------------------------------------------------------------------------


class Own(nn.Conv2d):
    """Does more than torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


class PreActivation(nn.Module):
    """A residual stream with batch-norm and relu before each layer; that behind `left` alone directly follows one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.left = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm2, self.right, self.out = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), out(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x + self.right(self.norm2(self.left(self.norm(x).relu())).relu())
        return self.out(x.mean((2, 3)))


def hooked(part: str) -> Callable[[], Head]:
    def make() -> Head:
        net = by_conv()
        net.get_submodule(part).register_forward_pre_hook(lambda module, args: (2 * args[0],))
        return net

    return make


def tied(net: nn.Module, x: Tensor) -> Tensor:
    return net.out(net.read(x).flatten(1)) + net.read.weight.sum()


def called_twice(net: nn.Module, x: Tensor) -> Tensor:
    return net.out(net.read(x).flatten(1) + net.read(x + 1).flatten(1))


def functional(net: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x.flatten(1), net.out.weight, net.out.bias)


class Written(Head):
    """What the batch-norm reads is changed before the layers behind it read."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        y = self.norm(x)
        x.add_(1)
        return self.then(self, y)


class Unmoduled(Head):
    """The batch-norm's module is never called."""

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        return self.then(self, F.batch_norm(self.conv(x).relu(), n.running_mean, n.running_var, n.weight, n.bias))


def renamed() -> Head:
    net = by_conv()
    net.alias = net.norm
    return net


def untracked() -> Head:
    net = by_conv()
    net.norm = nn.BatchNorm2d(4, track_running_stats=False)
    return net


def reads(then: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> Callable[[], Head]:
    return lambda: Head(then, **({"out": out()} | layers))


KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "zeros around": (partial(by_conv, padding=1), "read by read, which pads with zeros, while it adds a shift"),
    "zeros around, by name": (partial(by_conv, padding="same"), "read by read, which pads with zeros"),
    "largest": (
        lambda: pooled_by(lambda x: F.max_pool2d(x, 2), 4)[0],
        "read by max_pool2d, while some of its scales are negative",
    ),
    "average that counts zeros": (
        lambda: pooled_by(lambda x: F.avg_pool2d(x, 3, 2, 1), 9)[0],
        "read by avg_pool2d, which counts zeros in",
    ),
    "zeros by hand": (lambda: pooled_by(lambda x: F.pad(x, (1, 1)), 35)[0], "read by pad, which counts zeros in"),
    "ones by hand": (lambda: pooled_by(lambda x: F.pad(x, (1, 1), value=1.0), 35)[0], "padded with numbers"),
    "an activation": (PreActivation, "read by relu"),
    "an output": (reads(lambda net, x: x), "an output of the network"),
    "a sum": (reads(lambda net, x: net.out((x + x.flip(3)).flatten(1))), "read by add"),
    "a layer and more": (reads(lambda net, x: net.out(x.flatten(1)) + x.tanh().sum()), "read by tanh"),
    "a transposed convolution": (
        reads(lambda net, x: net.up(x).sum((2, 3)), up=nn.ConvTranspose2d(4, 3, 2)),
        "read by conv_transpose2d",
    ),
    "layer-norm": (reads(lambda net, x: net.out(F.layer_norm(x, (5,)).flatten(1))), "read by layer_norm"),
    "a mean over channels": (
        reads(lambda net, x: net.out(x.mean(1).flatten(1)), out=out(25)),
        "read by mean, which mixes channels",
    ),
    "a linear layer over places": (
        reads(lambda net, x: net.read(x).mean((2, 3)), read=nn.Linear(5, 5)),
        "read by read, which mixes channels",
    ),
    "tied weights": (reads(tied, read=nn.Conv2d(4, 4, 1)), "read by read, whose weights are read elsewhere too"),
    "a layer that is called twice": (reads(called_twice, read=nn.Conv2d(4, 4, 1)), "read by read, whose weights"),
    "no layer's call": (reads(functional), "read by linear outside of a layer of torch"),
    "a layer with its own forward": (
        reads(lambda net, x: net.out(net.read(x).flatten(1)), read=Own(4, 4, 1)),
        "read by read, which does more than a layer of torch",
    ),
    "hooks of its own": (hooked("norm"), "which does more than torch's own"),
    "hooks of the layer": (hooked("read"), "read by mul"),
    "written over": (lambda: Written(read("out"), out=out()), "behind a tensor that add_ writes into"),
    "not by its module": (lambda: Unmoduled(read("out"), out=out()), "used without a call of its module"),
    "two names": (renamed, "which has several names"),
    "statistics of the batch": (untracked, "without running statistics"),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_cannot_be_taken_over_says_why(kind: str) -> None:
    make, why = KEPT[kind]
    x = images()
    model = trained(make(), x)
    _, private = foldable(model, analyse(model, x, lambda net, batch: net(batch)))
    assert list(private) == ["norm"]
    assert private["norm"].startswith(why)


def test_of_a_network_with_pre_activation_what_directly_follows_a_layer_is_folded() -> None:
    x = images()
    model = trained(PreActivation(), x)
    folds, _ = foldable(model, analyse(model, x, lambda net, batch: net(batch)))
    assert [(each.layer, each.norm) for each in folds] == [("left", "norm2")]


def test_reasons_are_listed_together() -> None:
    private = {**dict.fromkeys(["a", "b", "c", "d", "e"], "read by relu"), "f": "an output of the network"}
    assert listed(private) == "a, b, c and 2 more (read by relu); f (an output of the network)"


# --- the joint network ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Batch-norm behind every relu, without padding."""

    def __init__(self, kernels: int = 4) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, kernels, 3), nn.BatchNorm2d(kernels)
        self.conv2, self.norm2 = nn.Conv2d(kernels, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.fc, self.norm3, self.out = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).relu())
        x = self.norm2(self.conv2(x).relu()).mean((2, 3))
        return self.out(self.norm3(self.fc(x).relu()))


def zipped_of(models: list[nn.Module], x: Tensor, **options: Any) -> tz.ZippedModel:
    tasks = [tz.Task(name, model, list(x.split(4))) for name, model in zip("ab", models, strict=True)]
    return tz.zip(tasks, **{"batch_norm": "fold", "share": 1.0, "progress": False, **options})


FOLDED = [("conv2", "norm"), ("fc", "norm2"), ("out", "norm3")]


def test_a_network_and_its_copy_have_everything_in_common_but_the_output_layer() -> None:
    x = images()
    model = trained(Net(), x)
    zipped = zipped_of([model, copy.deepcopy(model)], x)
    assert zipped.history.settings["folded"] == {"a": FOLDED, "b": FOLDED}
    assert list(zipped.buffers()) == []
    out = sum(p.numel() for p in model.out.parameters())
    assert zipped.parameter_count() - zipped.shared_parameter_count() == 2 * out
    for name in "ab":
        assert (zipped[name](x) - model(x)).abs().max() < 1e-8
    together = zipped.history.settings["flops"]
    assert together["together"] < 0.55 * sum(together["tasks"].values())


def test_loads_bit_identical(tmp_path: Path) -> None:
    x = images()
    models = [trained(Net(), x), trained(Net(5), x)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    zipped = zipped_of(models, x, share=0.6)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    zipped.save(tmp_path / "joint.safetensors")
    loaded = tz.load(tmp_path / "joint.safetensors", {"a": Net().to(DOUBLE), "b": Net(5).to(DOUBLE)})
    for name in "ab":
        assert torch.equal(loaded[name](x), zipped[name](x))
        assert type(zipped.materialize(name).norm) is nn.Identity
    with pytest.raises(tz.CheckpointError, match="does not fit the one saved"):
        tz.load(tmp_path / "joint.safetensors", {"a": Net().to(DOUBLE), "b": Net(6).to(DOUBLE)})


def test_nothing_shared_changes_nothing_with_private_and_folded_ones() -> None:
    x = images()
    models = [trained(PreActivation(), x), trained(by_conv(), x)]
    with pytest.warns(tz.TaskzipWarning, match=r"task 'a' keeps batch-norm private: norm \(read by relu\)"):
        zipped = zipped_of(models, x, share=0.0, layers={"conv": "conv"})
    for name, model in zip("ab", models, strict=True):
        assert (zipped[name](x) - model(x)).abs().max() < 1e-12
    assert zipped.history.settings["unfolded"]["b"] == {}


def test_zips_without_folding_say_nothing() -> None:
    x = images()
    model = trained(PreActivation(), x)
    zipped = zipped_of([model, copy.deepcopy(model)], x, batch_norm="private")
    assert "batch-norm" not in zipped.summary()
