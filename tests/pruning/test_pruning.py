"""`prune` and the optimal brain surgeon: against a literal twin, and by what must hold for every network."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import taskzip as tz
from taskzip.algebra.curvature import damped
from taskzip.algebra.factored import Factored
from taskzip.algebra.surgeon import ROUND, removal_costs
from taskzip.datasets import batches
from taskzip.training.distillation import distillation_loss

DOUBLE = torch.float64


def mlp(*, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 10, bias=bias), nn.ReLU(), nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 3))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def normed() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
    for _ in range(20):
        net(images())
    return net


def vectors(n: int = 80) -> Tensor:
    """Inputs that are strongly correlated."""
    return torch.randn(n, 3) @ torch.randn(3, 8) + 0.3 * torch.randn(n, 8)


def images(n: int = 40) -> Tensor:
    return F.avg_pool2d(torch.randn(n, 2, 8, 8), 3, stride=1)


def task(net: nn.Module, x: Tensor, **more: Any) -> tz.Task:
    return tz.Task("one", net, batches(x, torch.arange(len(x)) % 3, size=16), **more)


def prune(net: nn.Module, x: Tensor, **how: Any) -> nn.Module:
    return tz.prune(task(net, x), progress=False, **how)


def matrices(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters() if p.dim() > 1}


def kept(net: nn.Module) -> dict[str, int]:
    return {name.removesuffix(".weight"): int(w.count_nonzero()) for name, w in matrices(net).items()}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert list(a.state_dict()) == list(b.state_dict())
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


# --- the literal twin -----------------------------------------------------------------------------------------------


def literal_costs(h: np.ndarray, weights: np.ndarray, kept: int, free: int) -> np.ndarray:
    """Round by round, unit by unit, the inverse of the curvature over the support."""
    exists = weights != 0
    exists[:, free:] = True
    costs, lowest = np.full((len(weights), free), -np.inf), 0.0
    while True:
        now = {}
        for k, w in enumerate(weights):
            places = np.flatnonzero(exists[k])
            inverse = np.linalg.inv(h[np.ix_(places, places)])
            best = inverse @ (h @ w)[places]
            for i, q in enumerate(places):
                if q < free:
                    now[k, q] = costs[k, q] = max(lowest, best[i] ** 2 / (2 * inverse[i, i]))
        left = max(kept, int(ROUND * len(now)))
        if left >= len(now):
            return costs
        for k, q in sorted(now, key=now.__getitem__)[: len(now) - left]:
            exists[k, q] = False
            lowest = np.nextafter(costs[k, q], np.inf)


def literal_solution(h: np.ndarray, right: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """The least of 1/2 w^T H w - w^T right with w_q = 0 for all q of `zero`, from the Lagrange system."""
    constraints = np.eye(len(h))[zero]
    m = len(constraints)
    system = np.block([[h, constraints.T], [constraints, np.zeros((m, m))]])
    return np.linalg.solve(system, np.concatenate([right, np.zeros(m)]))[: len(h)]


def literal_fit(rows: np.ndarray, z: np.ndarray, present: np.ndarray, ridge: float) -> np.ndarray:
    gram = rows.T @ rows
    pull = ridge * np.maximum(np.diag(gram), 1e-2 * np.mean(np.diag(gram)))
    gram = gram + np.diag(pull)
    d = len(gram) - 1
    fits = []
    for k, w in enumerate(present):
        zero = [q for q in range(d) if w[q] == 0]
        fits.append(literal_solution(gram, rows.T @ z[:, k] + pull * w, np.array(zero, dtype=int)))
    return np.stack(fits)


def literal_prune(net: nn.Sequential, x: Tensor, keep: Mapping[str, float], damping: float, ridge: float) -> nn.Module:
    now = copy.deepcopy(net)
    changed = False
    for i, layer in enumerate(net):
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        read, answers = now[:i](x), net[: i + 1](x)
        if isinstance(layer, nn.Conv2d):
            read = F.unfold(read, layer.kernel_size, padding=layer.padding).mT
        rows = read.reshape(-1, read.shape[-1] if isinstance(layer, nn.Conv2d) else layer.in_features).detach().numpy()
        rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
        z = answers.movedim(1, -1).reshape(-1, answers.shape[1]).detach().numpy()
        w = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], dim=1).detach().numpy()
        if changed:
            w = literal_fit(rows, z, w, ridge)
        count = round(keep[str(i)] * w[:, :-1].size)
        h = rows.T @ rows
        h = h + damping * np.trace(h) / len(h) * np.eye(len(h))
        costs = literal_costs(h, w, count, w.shape[1] - 1)
        w[:, :-1][costs < np.sort(costs.ravel())[-count]] = 0
        w = literal_fit(rows, z, w, ridge)
        changed = True
        with torch.no_grad():
            now[i].weight.copy_(torch.from_numpy(w[:, :-1]).reshape(layer.weight.shape))
            now[i].bias.copy_(torch.from_numpy(w[:, -1]))
    return now


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_is_the_literal_surgeon(kind: str) -> None:
    net, x = (mlp(), vectors()) if kind == "linear" else (cnn(), images())
    net, x = net.double(), x.double()
    keep = dict(zip((name.removesuffix(".weight") for name in matrices(net)), (0.3, 0.2, 0.5), strict=True))
    found = prune(net, x, keep=keep, damping=0.02, ridge=0.004, max_rows=None)
    wanted = literal_prune(net, x, keep, damping=0.02, ridge=0.004)
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-6, atol=1e-8)
        assert ((found.state_dict()[name] == 0) == (value.abs() < 1e-10)).all()


def surgeon_case(seed: int, n: int, d: int, units: int) -> tuple[Factored, Tensor]:
    torch.manual_seed(seed)
    rows = torch.randn(n, 3, dtype=DOUBLE) @ torch.randn(3, d, dtype=DOUBLE) + 0.3 * torch.randn(n, d, dtype=DOUBLE)
    weights = torch.randn(units, d, dtype=DOUBLE)
    weights[torch.rand(units, d) < 0.2] = 0
    return damped(Factored(rows, rows.new_zeros(d)), 0.01), weights


@settings(max_examples=10)
@given(st.integers(0, 2**32), st.integers(2, 9), st.integers(2, 9), st.integers(1, 5), st.booleans(), st.booleans())
def test_costs_are_the_literal_ones(seed: int, n: int, d: int, units: int, bias: bool, whole: bool) -> None:
    """Also in rounds, where weights are missing from the start, and where the curvature is factored."""
    h, weights = surgeon_case(seed, n, d, units)
    if whole:
        weights = torch.where(weights == 0, torch.rand_like(weights), weights)
    count, free = int(weights[:, : d - bias].count_nonzero()) // 5, d - bias
    wanted = torch.from_numpy(literal_costs(h.dense().numpy(), weights.numpy(), count, free))
    before = weights.clone()
    for curvature in (h, h.dense()):
        found = removal_costs(curvature, weights, count, free=free)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-12)
    assert torch.equal(weights, before)


def test_a_cost_is_the_rise_of_the_error_of_the_best_weights_without_it() -> None:
    h, w = surgeon_case(1, 9, 6, 1)
    h, w = h.dense(), w + 0.1 * (w == 0)
    costs = removal_costs(h, w, 6, free=6)[0]
    for q in range(6):
        best = torch.from_numpy(literal_solution(h.numpy(), (h @ w[0]).numpy(), np.array([q])))
        torch.testing.assert_close(costs[q], (best - w[0]) @ h @ (best - w[0]) / 2)


def test_large_supports_are_cut_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would take too long unit by unit is ranked once, as in the paper; the last round's costs never fall."""
    h, weights = surgeon_case(2, 30, 12, 4)
    weights = torch.where(weights == 0, torch.rand_like(weights), weights)
    once = weights.square() / (2 * torch.linalg.inv(h.dense()).diagonal())
    monkeypatch.setattr("taskzip.algebra.surgeon._WORK", 4.0 * 3**3)
    found = removal_costs(h.dense(), weights, 12, free=12)
    gone = once.flatten().argsort()[: 48 - 12]
    torch.testing.assert_close(found.flatten()[gone], once.flatten()[gone])
    assert set(found.flatten().argsort()[: 48 - 12].tolist()) == set(gone.tolist())


# --- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, x", [(mlp, vectors), (cnn, images), (normed, images)])
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.9])
def test_a_fraction_is_kept_exactly_and_no_layer_vanishes(make: Any, x: Any, keep: float) -> None:
    net = make()
    found = kept(prune(net, x(), keep=keep))
    assert sum(found.values()) == round(keep * sum(w.numel() for w in matrices(net).values()))
    assert all(found.values())


def test_a_dict_is_kept_exactly_and_other_layers_stay() -> None:
    net = mlp()
    pruned = prune(net, vectors(), keep={"2": 0.25, "0": 0.5})
    assert kept(pruned) == {"0": 40, "2": round(0.25 * 70), "4": 21}
    assert torch.equal(pruned[4].weight, net[4].weight)
    assert torch.equal(pruned[4].bias, net[4].bias)
    assert not torch.equal(pruned[0].bias, net[0].bias)


def test_a_layer_kept_whole_makes_up_for_those_before_it() -> None:
    net, x = mlp(), vectors()
    alone, both = prune(net, x, keep={"2": 0.2}), prune(net, x, keep={"2": 0.2, "4": 1.0})
    assert torch.equal(alone[2].weight, both[2].weight)
    assert F.mse_loss(both(x), net(x)) < F.mse_loss(alone(x), net(x))


@pytest.mark.parametrize("keep", [1.0, {"0": 1.0, "4": 1.0}])
@pytest.mark.parametrize("make, x", [(mlp, vectors), (normed, images)])
def test_nothing_changes_where_nothing_is_removed(make: Any, x: Any, keep: Any) -> None:
    net = make()
    assert_same(prune(net, x(), keep=keep), net)


def test_zeros_stay_and_count_as_removed() -> None:
    net, x = mlp(), vectors()
    with torch.no_grad():
        net[2].weight[torch.rand(7, 10) < 0.5] = 0
        net[4].weight[:] = 0
    there = {name: w != 0 for name, w in matrices(net).items()}
    sparse = prune(net, x, keep={"0": 0.5, "2": 0.3, "4": 0.5})
    assert kept(sparse) == {"0": 40, "2": 21, "4": 0}
    assert all((w[~there[name]] == 0).all() for name, w in matrices(sparse).items())
    assert_same(prune(net, x, keep={"2": 0.9}), net)
    assert sum(kept(prune(net, x, keep=0.9)).values()) == sum(kept(net).values())


def test_is_better_than_magnitude_and_than_ranking_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = nn.Sequential(nn.Linear(8, 60)), vectors(400)
    surgeon = prune(net, x, keep=0.3)
    magnitude = copy.deepcopy(net)
    with torch.no_grad():
        least = net[0].weight.abs().flatten().topk(144).values[-1]
        magnitude[0].weight[net[0].weight.abs() < least] = 0
    monkeypatch.setattr("taskzip.algebra.surgeon._WORK", 0.0)
    once = prune(net, x, keep=0.3)
    assert kept(surgeon) == kept(magnitude) == kept(once) == {"0": 144}
    with torch.no_grad():
        errors = [float(F.mse_loss(each(x), net(x))) for each in (surgeon, once, magnitude)]
    assert errors[0] < 0.9 * errors[1] < 0.9 * errors[2]


# --- data and networks as they come -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_dead_inputs_go_first(bias: bool) -> None:
    net, x = mlp(bias=bias), vectors()
    x[:, :4] = 0
    pruned = prune(net, x, keep={"0": 0.5}, damping=0.0)
    assert kept(pruned)["0"] == 40
    assert (pruned[0].weight[:, :4] == 0).all()
    torch.testing.assert_close(pruned(x), net(x), rtol=1e-4, atol=1e-4)


def test_nothing_but_zeros_as_inputs() -> None:
    pruned = prune(mlp(bias=False), torch.zeros(20, 8), keep=0.2, damping=0.0, ridge=0.0)
    assert all(torch.isfinite(p).all() for p in pruned.parameters())


def test_many_more_inputs_than_rows() -> None:
    net, x = nn.Sequential(nn.Linear(1100, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(20, 1100)
    pruned = prune(net, x, keep=0.05)
    assert sum(kept(pruned).values()) == round(0.05 * 4408)
    assert F.mse_loss(pruned(x), net(x)) < 0.05 * net(x).var()


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise, self.norm = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.depthwise(self.first(x).relu())).relu().mean((2, 3)))


def test_grouped_convolutions_stay_whole_and_count(caplog: pytest.LogCaptureFixture) -> None:
    net, x = Grouped(), images()
    with caplog.at_level(logging.WARNING, "taskzip"):
        pruned = prune(net, x, keep=0.5)
    assert caplog.messages == ["task 'one': left whole: depthwise (a grouped convolution)"]
    assert torch.equal(pruned.depthwise.weight, net.depthwise.weight)
    assert sum(kept(pruned).values()) == round(0.5 * (108 + 54 + 18))
    assert not torch.equal(pruned.norm.running_var, net.norm.running_var)  # it follows what lies before it


def test_the_scale_of_units_before_a_batch_norm_means_nothing() -> None:
    net, x = normed().double().eval(), images().double()
    scaled, scale = copy.deepcopy(net), torch.logspace(-2, 2, 5, dtype=DOUBLE)
    with torch.no_grad():
        net[1].eps = scaled[1].eps = 1e-12
        scaled[0].weight.mul_(scale[:, None, None, None])
        scaled[0].bias.mul_(scale)
        scaled[1].running_mean.mul_(scale)
        scaled[1].running_var.mul_(scale**2)
    a, b = prune(net, x, keep=0.2), prune(scaled, x, keep=0.2)
    assert torch.equal(a[0].weight != 0, b[0].weight != 0)
    torch.testing.assert_close(a(x), b(x))


# --- the caller's network, the product ----------------------------------------------------------------------------


def test_the_given_network_is_untouched() -> None:
    net, x = normed(), images()
    net[4].eval()
    net(x).sum().backward()
    before, gradients = copy.deepcopy(net), [p.grad.clone() for p in net.parameters()]
    state = torch.get_rng_state()
    pruned = prune(net, x, keep=0.3, retrain=tz.Retraining(3, loss="distill"))
    assert_same(net, before)
    assert [m.training for m in net.modules()] == [m.training for m in before.modules()]
    assert all(map(torch.equal, (p.grad for p in net.parameters()), gradients))
    assert torch.equal(torch.get_rng_state(), state)
    assert type(pruned) is type(net)
    assert list(pruned.state_dict()) == list(net.state_dict())
    assert not any(m.training for m in pruned.modules())
    assert all(p.grad is None for p in pruned.parameters())
    assert {id(p) for p in pruned.parameters()}.isdisjoint(id(p) for p in net.parameters())


@pytest.mark.parametrize("loss", ["labels", "distill"])
@pytest.mark.parametrize("make, x", [(mlp, vectors), (cnn, images)])
def test_retraining_learns_and_keeps_the_zeros(make: Any, x: Any, loss: Any) -> None:
    net, x = make(), x()
    each = tz.Task("one", net, [(x, torch.arange(len(x)) % 3)])  # watched on itself
    pruned = tz.prune(each, keep=0.3, progress=False)
    retrained = tz.prune(each, keep=0.3, retrain=tz.Retraining(20, loss=loss), progress=False)
    for name, w in matrices(pruned).items():
        assert torch.equal(w != 0, matrices(retrained)[name] != 0)
        assert not torch.equal(w, matrices(retrained)[name])
    ((_, targets),) = each.data
    of = {"labels": lambda y: F.cross_entropy(y, targets), "distill": lambda y: distillation_loss(each, y, net(x))}
    assert of[loss](retrained(x)) < of[loss](pruned(x))


def test_the_same_seed_gives_the_same_network() -> None:
    net, x = cnn(), images()
    a, b = (prune(net, x, keep=0.3, retrain=5, max_rows=100, seed=3) for _ in range(2))
    assert_same(a, b)


def test_pruned_networks_zip_and_keep_their_zeros() -> None:
    x = vectors()
    pruned = [prune(mlp(), x, keep=0.3) for _ in range(2)]
    tasks = [tz.Task(name, net, batches(x)) for name, net in zip("AB", pruned, strict=True)]
    apart = tz.zip(tasks, share=0.0, progress=False)
    assert apart.connection_count() == sum(sum(kept(net).values()) for net in pruned)
    joint = tz.zip(tasks, share=1.0, progress=False)
    assert joint.connection_count() <= apart.connection_count()


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, message",
    [
        ({"keep": 0.0}, r"keep for all layers is 0.0: give a fraction above 0"),
        ({"keep": 1.5}, r"keep for all layers is 1.5"),
        ({"keep": True}, r"keep for all layers is True"),
        ({"keep": float("nan")}, r"keep for all layers is nan"),
        ({"keep": {"0": "half"}}, r"keep for layer '0' is 'half'"),
        ({"keep": {"0": -0.1}}, r"keep for layer '0' is -0.1"),
        ({"keep": {"fc9": 0.5}}, r"task 'one': keep names layer 'fc9'; its layers are 0, 2, 4"),
        ({"keep": 0.01}, r"task 'one': keep=0.01 leaves too little: .* are 0.018 of the weights"),
        ({"keep": 0.5, "damping": -1}, r"damping=-1 must be"),
        ({"keep": 0.5, "ridge": float("inf")}, r"ridge=inf must be"),
        ({"keep": 0.5, "max_rows": 0}, r"max_rows=0 must be"),
        ({"keep": 0.5, "retrain": -1}, r"steps=-1 must be"),
        ({"keep": 0.5, "retrain": {"0": 3}}, r"prune retrains once, at the end"),
        ({"keep": 0.5, "seed": 0.5}, r"seed=0.5 must be"),
    ],
)
def test_settings_that_cannot_be_used(how: dict[str, Any], message: str) -> None:
    with pytest.raises(tz.InputError, match=message):
        prune(mlp(), vectors(), **how)


def test_networks_and_data_that_cannot_be_used() -> None:
    x = vectors()
    with pytest.raises(tz.InputError, match=r"prune takes a taskzip\.Task, got Sequential"):
        tz.prune(mlp(), keep=0.5)
    with pytest.raises(tz.InputError, match="task 'one': batch 0 of the calibration data has NaN"):
        prune(mlp(), x * torch.nan, keep=0.5)
    with pytest.raises(tz.InputError, match=r"task 'one': the network fails on batch 0 with inputs \(16, 5\)"):
        prune(mlp(), x[:, :5], keep=0.5)
    with pytest.raises(tz.InputError, match="task 'one': its batches have no targets; pass loss='distill'"):
        tz.prune(tz.Task("one", mlp(), batches(x)), keep=0.5, retrain=1)
    with pytest.raises(tz.InputError, match=r"layer 'depthwise' cannot be pruned \(a grouped convolution\): leave"):
        prune(Grouped(), images(), keep={"depthwise": 0.5})
