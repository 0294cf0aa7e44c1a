"""Share plans that are found: budgets are kept, certificates are true, and both are worth their cost."""

from __future__ import annotations

import itertools
import logging
import math
import re
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from networks import Attention
from torch import Tensor, nn

import taskzip as tz
from taskzip.datasets import batches
from taskzip.planning.curves import Tradeoff
from taskzip.planning.plan import Share
from taskzip.zipping.algorithm import _zip
from taskzip.zipping.settings import read_settings


def fc(seed: int, *sizes: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


pytestmark = pytest.mark.filterwarnings("ignore:.* shares one unit:taskzip.TaskzipWarning")  # plans that were found


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back, self.head = (
            nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 8), nn.Linear(8, 3)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.back(self.inner(x.relu()).relu()))


def normed(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))
    net(torch.randn(200, 6))
    return net.eval()


def labelled(net: nn.Module, seed: int, n: int = 200, shape: tuple[int, ...] = (6,)) -> Any:
    """Random inputs and the classes that the network itself gives them, some of them wrong."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=rng)
    with torch.no_grad():
        y = net(x).argmax(1)
    wrong = torch.rand(y.shape, generator=rng) < 0.1
    return batches(x, torch.where(wrong, torch.zeros_like(y), y), size=64)


def tasks_of(*nets: nn.Module, shape: tuple[int, ...] = (6,)) -> tuple[list[tz.Task], dict[str, Any]]:
    """Tasks with calibration data, and held-out data."""
    names = "abcd"[: len(nets)]
    tasks = [
        tz.Task(name, net, labelled(net, k, shape=shape)) for k, (name, net) in enumerate(zip(names, nets, strict=True))
    ]
    return tasks, {
        name: labelled(net, 10 + k, shape=shape) for k, (name, net) in enumerate(zip(names, nets, strict=True))
    }


PAIR, HELD_OUT = tasks_of(fc(0, 6, 10, 8, 3), fc(1, 6, 10, 8, 3))


def run_zip(tasks: list[tz.Task], share: Any, **options: Any) -> tz.ZippedModel:
    return tz.zip(tasks, share=share, progress=False, **options)


def accuracy(net: nn.Module, data: Any) -> float:
    with torch.no_grad():
        right = [net(x).argmax(1) == y for x, y in data]
    return 100 * torch.cat(right).double().mean().item()


def apart(tasks: list[tz.Task]) -> int:
    return sum(p.numel() for task in tasks for p in task.model.parameters())


def counts_of(zipped: tz.ZippedModel) -> dict[str, int]:
    return zipped.history.settings["share"]["share"]


def same(one: tz.ZippedModel, other: tz.ZippedModel) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def right(net: nn.Module, data: Any) -> np.ndarray:
    """Which answers are right, 1 or 0."""
    with torch.no_grad():
        return torch.cat([net(x).argmax(1) == y for x, y in data]).double().numpy()


def check_certificate(
    zipped: tz.ZippedModel, tasks: list[tz.Task], held_out: dict[str, Any], points: float, evaluations: int = 16
) -> None:
    """What the history says was measured is what is measured now."""
    search = zipped.history.settings["search"]
    assert search["max_drop"] == points and list(search["tasks"]) == [task.name for task in tasks]
    for task in tasks:
        said, data = search["tasks"][task.name], held_out[task.name]
        before, after = accuracy(task.model, data), accuracy(zipped[task.name], data)
        assert said["before"] == pytest.approx(before) and said["after"] == pytest.approx(after)
        assert said["lost"] == pytest.approx(before - after, abs=1e-8)
        apart = 100 * (right(task.model, data) - right(zipped[task.name], data))
        quantile = scipy.stats.norm.ppf(1 - (1 - search["confidence"]) / evaluations) if search["confidence"] else 0
        bound = apart.mean() + quantile * apart.std(ddof=1) / len(apart) ** 0.5
        assert said["at_most"] == pytest.approx(bound, abs=1e-6) and said["lost"] <= said["at_most"] <= points
        assert said["samples"] == sum(len(x) for x, _ in data)


# --- the curves of a zip ------------------------------------------------------------------------------------------


def curves_of(tasks: list[tz.Task], share: Any = 1.0, **options: Any) -> Any:
    names = [task.name for task in tasks]
    defaults: dict[str, Any] = {
        "balance": None, "matching": "optimal", "compensate": True, "adapt": None, "spread": None, "own_scale": None,
        "residual": "coupled", "aligned": None, "cross": True, "connections": "denser",
        "batch_norm": "private", "layers": None, "damping": 1e-2, "ridge": 0.1,
        "max_rows": "auto", "retrain": None, "seed": 0,
    }  # fmt: skip
    return _zip(tasks, read_settings(names, share=share, **defaults | options), progress=False)


@pytest.mark.parametrize("compensate", [True, False])
def test_a_curve_ends_at_the_cost_of_the_layer_relative_to_its_energy(compensate: bool) -> None:
    zipped, curves = curves_of(PAIR, max_rows=None, compensate=compensate)
    assert [curve.layer for curve in curves] == ["0", "2"]
    variance = []
    for task in PAIR:
        x = torch.cat([x for x, _ in task.data])
        variance.append(task.model[0](x).double().var(0, correction=0).sum().item())
    # Half the variance, balanced over two tasks, or relative to its mean over the units of each.
    energy = 10 / 2 if compensate else sum(variance) / 2 / 2
    assert curves[0].cost[-1] * energy == pytest.approx(zipped.history.layers[0].cost, rel=1e-4)
    for curve, units in zip(curves, (10, 8), strict=True):
        steps = np.diff(curve.cost)
        assert len(curve.cost) == units + 1 and curve.cost[0] == 0
        assert (steps >= 0).all() and (np.diff(steps) >= 0).all()


@pytest.mark.parametrize("options", [{}, {"aligned": True}, {"compensate": False, "matching": "greedy"}])
def test_for_two_tasks_the_saving_of_a_plan_is_known_before(options: dict[str, Any]) -> None:
    nets = [nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), fc(seed, 80, 8, 7, 3)) for seed in (0, 1)]
    tasks, _ = tasks_of(*nets, shape=(1, 6, 6))
    tradeoff = Tradeoff(curves_of(tasks, **options)[1])
    for plan in ((5, 8, 7), (3, 5, 2), (1, 8, 0), (4, 0, 0)):
        counts = dict(zip(tradeoff.everything, plan, strict=True))
        zipped = run_zip(tasks, counts, **options)
        assert apart(tasks) - zipped.parameter_count() == tradeoff.saving(counts), plan


# --- Budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 0.8, 0.75])
def test_a_budget_is_kept_and_hardly_anything_is_left_of_it(size: float) -> None:
    zipped = run_zip(PAIR, tz.Budget(size))
    limit = int(size * apart(PAIR))
    assert limit - 20 <= zipped.parameter_count() <= limit
    search = zipped.history.settings["search"]
    assert search == {"budget": size, "parameters": zipped.parameter_count(), "most": limit, "zips": 2}
    assert same(zipped, run_zip(PAIR, counts_of(zipped)))


def test_a_budget_in_bytes() -> None:
    fraction = run_zip(PAIR, tz.Budget(0.75))
    size = 4 * int(0.75 * apart(PAIR)) + 3
    zipped = run_zip(PAIR, tz.Budget(size))
    assert counts_of(zipped) == counts_of(fraction)
    assert 4 * zipped.parameter_count() <= size


def test_no_equal_share_of_every_layer_that_fits_costs_less() -> None:
    tradeoff = Tradeoff(curves_of(PAIR)[1])
    for size in (0.9, 0.8, 0.73):
        found = tradeoff.cost(counts_of(run_zip(PAIR, tz.Budget(size))))
        equal = [{"0": round(10 * f), "2": round(8 * f)} for f in np.linspace(0, 1, 41)]
        fitting = [plan for plan in equal if apart(PAIR) - tradeoff.saving(plan) <= size * apart(PAIR)]
        assert found <= min(map(tradeoff.cost, fitting)) + 1e-12


def test_a_budget_that_nothing_fits_names_the_smallest_that_something_does() -> None:
    smallest = run_zip(PAIR, 1.0).parameter_count()
    part = math.ceil(1e4 * smallest / apart(PAIR)) / 1e4
    with pytest.raises(
        tz.InputError, match=rf"still has {smallest} parameters.*Budget\({part}\) or Budget\({4 * smallest}\)"
    ):
        run_zip(PAIR, tz.Budget(part - 0.01))
    for size in (part, 4 * smallest):
        assert run_zip(PAIR, tz.Budget(size)).parameter_count() == smallest
    with pytest.raises(tz.InputError, match="cannot be met"):
        run_zip(PAIR, tz.Budget(4 * smallest - 1))


def test_a_budget_for_three_tasks_of_different_widths() -> None:
    tasks, _ = tasks_of(fc(0, 6, 10, 8, 3), fc(1, 6, 12, 7, 3), fc(2, 6, 9, 9, 3))
    for size in (0.9, 0.75):
        zipped = run_zip(tasks, tz.Budget(size))
        assert size * apart(tasks) - 20 <= zipped.parameter_count() <= size * apart(tasks)
        assert zipped.history.settings["search"]["zips"] <= 4


@pytest.mark.parametrize("size", [0.9, 0.7])
@pytest.mark.parametrize(
    ("widths", "options"),
    [
        (((12, 16), (24, 24), (32, 20)), {}),
        (((40, 30), (40, 30)), {}),
        (((40, 30), (40, 30)), {"cross": False}),
        (((40, 30), (30, 40)), {"cross": False}),
    ],
)
def test_a_budget_uses_what_it_may(widths: Any, size: float, options: dict[str, Any]) -> None:
    tasks, _ = tasks_of(*(fc(k, 6, *each, 3) for k, each in enumerate(widths)))
    zipped = run_zip(tasks, tz.Budget(size), **options)
    limit = size * apart(tasks)
    assert limit - max(0.005 * limit, 50) <= zipped.parameter_count() <= limit  # a unit has up to 50 weights
    assert zipped.history.settings["search"]["zips"] <= 4


# --- MaxDrop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [0, 7, 10])
def test_no_task_loses_more_than_it_may_and_the_certificate_is_true(points: float) -> None:
    plan = tz.MaxDrop(points, HELD_OUT, confidence=0.7, evaluations=6)
    zipped = run_zip(PAIR, plan)
    check_certificate(zipped, PAIR, HELD_OUT, points, evaluations=6)
    assert zipped.history.settings["search"]["evaluations"] <= 6
    assert same(zipped, run_zip(PAIR, counts_of(zipped)))
    if points:
        assert 0 < sum(counts_of(zipped).values()) < 18


def test_more_points_never_save_less_and_enough_points_share_everything() -> None:
    sizes = [run_zip(PAIR, tz.MaxDrop(p, HELD_OUT, evaluations=6)).parameter_count() for p in (0, 4, 100)]
    assert sizes[0] >= sizes[1] > sizes[2] == run_zip(PAIR, 1.0).parameter_count()


def test_what_is_found_comes_near_the_best_of_all_plans() -> None:
    tasks, held_out = tasks_of(fc(4, 6, 4, 3, 3), fc(5, 6, 4, 3, 3))
    points, sizes = 6.0, [apart(tasks)]
    for counts in itertools.product(range(1, 5), range(4)):
        zipped = run_zip(tasks, dict(zip(("0", "2"), counts, strict=True)))
        if all(
            accuracy(t.model, held_out[t.name]) - accuracy(zipped[t.name], held_out[t.name]) <= points for t in tasks
        ):
            sizes.append(zipped.parameter_count())
    found = run_zip(tasks, tz.MaxDrop(points, held_out, confidence=None, evaluations=10)).parameter_count()
    assert min(sizes) <= found <= apart(tasks) - 0.6 * (apart(tasks) - min(sizes))


def test_identical_networks_share_everything_in_one_evaluation() -> None:
    net = fc(3, 6, 10, 8, 3)
    tasks, held_out = tasks_of(net, net)
    zipped = run_zip(tasks, tz.MaxDrop(0, held_out))
    assert counts_of(zipped) == {"0": 10, "2": 8}
    assert zipped.history.settings["search"]["evaluations"] == 1


def test_where_every_plan_loses_too_much_nothing_is_shared() -> None:
    calls = []

    def falling(output: Tensor, targets: Tensor) -> float:
        calls.append(len(output))
        return -float(len(calls))

    zipped = run_zip(PAIR, tz.MaxDrop(0, HELD_OUT, falling, evaluations=3))
    assert set(counts_of(zipped).values()) == {0}
    assert zipped.parameter_count() == apart(PAIR)
    assert zipped.history.settings["search"]["evaluations"] == 3


def test_retraining_and_shuffled_data_are_measured_as_they_are() -> None:
    options = {"retrain": tz.Retraining(3, loss="distill")}
    zipped = run_zip(PAIR, tz.MaxDrop(5, HELD_OUT, evaluations=3), **options)
    check_certificate(zipped, PAIR, HELD_OUT, 5, evaluations=3)
    assert same(zipped, run_zip(PAIR, counts_of(zipped), **options))


KINDS: dict[str, tuple[list[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "three tasks": ([fc(0, 6, 9, 7, 3), fc(1, 6, 8, 7, 3), fc(2, 6, 9, 6, 3)], (6,), {}),
    "residual stream": ([Residual().eval(), Residual().eval()], (6,), {}),
    "independent": ([Residual().eval(), Residual().eval()], (6,), {"residual": "independent"}),
    "aligned": ([fc(0, 6, 10, 8, 3), fc(1, 6, 10, 8, 3)], (6,), {"aligned": True}),
    "batch-norm private": ([normed(0), normed(1)], (6,), {}),
    "batch-norm folded": ([normed(0), normed(1)], (6,), {"batch_norm": "fold"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_keeps_its_promise(kind: str) -> None:
    nets, shape, options = KINDS[kind]
    tasks, held_out = tasks_of(*nets, shape=shape)
    dropped = run_zip(tasks, tz.MaxDrop(4, held_out, evaluations=3), **options)
    check_certificate(dropped, tasks, held_out, 4, evaluations=3)
    fitted = run_zip(tasks, tz.Budget(0.8), **options)
    assert fitted.parameter_count() <= 0.8 * apart(tasks)


def test_attention_heads() -> None:
    torch.manual_seed(0)
    nets = [Attention().eval(), Attention().eval()]
    held_out = {
        name: [(x, net(x).mean(1).argmax(1)) for x in torch.randn(3, 20, 5, 4)]
        for name, net in zip("ab", nets, strict=True)
    }
    tasks = [tz.Task(name, net, [torch.randn(40, 5, 4)]) for name, net in zip("ab", nets, strict=True)]

    def right(output: Tensor, targets: Tensor) -> Tensor:
        return 100.0 * (output.mean(1).argmax(1) == targets)

    zipped = run_zip(tasks, tz.MaxDrop(15, held_out, right, evaluations=5))
    search = zipped.history.settings["search"]["tasks"]
    assert all(each["before"] == 100 and each["lost"] <= 15 for each in search.values())
    assert run_zip(tasks, tz.Budget(0.75)).parameter_count() <= 0.75 * apart(tasks)


# --- metrics ------------------------------------------------------------------------------------------------------


def squared(output: Tensor, targets: Tensor) -> Tensor:
    return -F.mse_loss(output, targets)


def test_a_metric_is_averaged_over_samples_not_over_batches() -> None:
    nets = [fc(0, 6, 10, 8, 3), fc(1, 6, 10, 8, 3)]
    tasks = [tz.Task(n, net, [torch.randn(50, 6)], loss=F.mse_loss) for n, net in zip("ab", nets, strict=True)]
    held_out = {n: [(torch.randn(k, 6), torch.randn(k, 3)) for k in (40, 1, 7)] for n in "ab"}
    per_sample = tz.MaxDrop(100, held_out, {"a": squared, "b": lambda y, t: -(y - t).square()})
    search = run_zip(tasks, per_sample).history.settings["search"]["tasks"]
    for task in tasks:
        x, y = (torch.cat(each) for each in zip(*held_out[task.name], strict=True))
        assert search[task.name]["before"] == pytest.approx(squared(task.model(x), y).item(), rel=1e-5)


def test_the_metric_of_a_task_comes_before_accuracy_and_that_of_the_plan_before_both() -> None:
    def zero(output: Tensor, targets: Tensor) -> int:
        return 0

    def one(output: Tensor, targets: Tensor) -> Tensor:
        return torch.ones(len(output), dtype=torch.bool)

    tasks = [tz.Task(t.name, t.model, t.data, metric=zero) for t in PAIR]
    measured = run_zip(tasks, tz.MaxDrop(0, HELD_OUT)).history.settings["search"]["tasks"]
    assert [each["before"] for each in measured.values()] == [0, 0]
    measured = run_zip(tasks, tz.MaxDrop(0, HELD_OUT, {"a": one})).history.settings["search"]["tasks"]
    assert [each["before"] for each in measured.values()] == [1, 0]


def test_targets_that_the_loss_ignores_do_not_count() -> None:
    loss = nn.CrossEntropyLoss(ignore_index=2)
    tasks = [tz.Task(t.name, t.model, t.data, loss=loss) for t in PAIR]
    measured = run_zip(tasks, tz.MaxDrop(100, HELD_OUT)).history.settings["search"]["tasks"]
    for task in tasks:
        right = torch.cat([(task.model(x).argmax(1) == y)[y != 2] for x, y in HELD_OUT[task.name]])
        assert measured[task.name]["before"] == pytest.approx(100 * right.double().mean().item())


# --- what is said -------------------------------------------------------------------------------------------------


def test_the_summary_says_what_was_found_and_a_checkpoint_keeps_it(tmp_path: Any) -> None:
    for plan, text in (
        (
            tz.MaxDrop(100, HELD_OUT),
            r"MaxDrop\(100\), 95% sure, 1 evaluations: a \d+\.\d\d to \d+\.\d\d",
        ),
        (tz.Budget(0.75), rf"Budget\(0\.75\): \d+ of at most {int(0.75 * apart(PAIR))} parameters"),
    ):
        zipped = run_zip(PAIR, plan)
        zipped.save(tmp_path / "joint.safetensors")
        loaded = tz.load(tmp_path / "joint.safetensors", {t.name: t.model for t in PAIR})
        assert loaded.history.settings["search"] == zipped.history.settings["search"]
        assert counts_of(loaded) == counts_of(zipped)
        assert re.search(text, loaded.summary().replace("\n ", ""))
        assert max(map(len, loaded.summary().splitlines())) <= 100
    assert "MaxDrop" not in run_zip(PAIR, 0.5).summary()


def test_what_is_tried_goes_to_the_log_and_the_bar_to_standard_error(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "taskzip"):
        run_zip(PAIR, tz.MaxDrop(100, HELD_OUT))
    said = [record.getMessage() for record in caplog.records]
    assert any("evaluation 1: " in line and "lost of 100" in line for line in said)
    assert "found: 0 10, 2 8" in said
    assert capsys.readouterr() == ("", "")


def test_the_networks_and_the_random_generator_stay_as_they_were() -> None:
    before = [{k: v.clone() for k, v in t.model.state_dict().items()} for t in PAIR]
    state = torch.get_rng_state()
    run_zip(
        PAIR, tz.MaxDrop(3, {t.name: batches(t.data.inputs, t.data.targets, shuffle=True) for t in PAIR}, evaluations=2)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert all(
        torch.equal(v, t.model.state_dict()[k]) for t, old in zip(PAIR, before, strict=True) for k, v in old.items()
    )


# --- errors -------------------------------------------------------------------------------------------------------

X, Y = torch.randn(8, 6), torch.zeros(8, dtype=torch.long)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (tz.MaxDrop(1, {"a": [(X, Y)]}), "no held-out data for task 'b'"),
        (tz.MaxDrop(1, {**HELD_OUT, "c": [(X, Y)]}), "data names task 'c'; the tasks are a, b"),
        (tz.MaxDrop(1, HELD_OUT, {"c": squared}), "metric names task 'c'; the tasks are a, b"),
        (tz.MaxDrop(1, {**HELD_OUT, "b": [X]}), "task 'b': batch 0 of its held-out data has no targets"),
        (tz.MaxDrop(1, {**HELD_OUT, "b": []}), "task 'b': its held-out data have 0 samples"),
        (tz.MaxDrop(1, {**HELD_OUT, "b": X}), "task 'b': data is one tensor"),
        (tz.MaxDrop(1, {**HELD_OUT, "b": [Y.sum]}), "task 'b': batch 0 of its held-out data holds no tensor"),
        (tz.MaxDrop(1, HELD_OUT, lambda y, t: math.nan), "task 'a': batch 0 .* gives nan as its metric"),
        (tz.MaxDrop(1, HELD_OUT, lambda y, t: "good"), "gives 'good' as its metric, which is no number"),
        (tz.MaxDrop(1, HELD_OUT, lambda y, t: None), "gives None as its metric, which is no number"),
        (tz.MaxDrop(1, HELD_OUT, lambda y, t: y[:3]), r"gives a metric of shape \(3, 3\) for 64 samples"),
    ],
)
def test_what_cannot_be_measured(plan: tz.MaxDrop, message: str) -> None:
    with pytest.raises(tz.InputError, match=message):
        run_zip(PAIR, plan)


def test_no_metric_follows_from_another_loss_than_cross_entropy() -> None:
    tasks = [PAIR[0], tz.Task("b", PAIR[1].model, PAIR[1].data, loss=F.mse_loss)]
    with pytest.raises(tz.InputError, match=r"task 'b': its loss is not cross-entropy.* give it a metric"):
        run_zip(tasks, tz.MaxDrop(1, HELD_OUT))


def test_an_output_without_classes_needs_a_metric() -> None:
    class Wrapped(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x), "more_logits": x}

    tasks = [tz.Task(t.name, Wrapped(t.model), t.data) for t in PAIR]
    with pytest.raises(tz.InputError, match=r"task 'a': batch 0 .* gives no tensor with classes along axis 1"):
        run_zip(tasks, tz.MaxDrop(1, HELD_OUT))


def test_data_that_can_be_read_only_once_behind_another_face() -> None:
    class Once:
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            return iter([(X, Y)] * (3 if self.passes < 3 else 1))

    with pytest.raises(tz.InputError, match="held-out data have 8 samples, and 24 were expected"):
        run_zip(PAIR, tz.MaxDrop(1, {**HELD_OUT, "b": Once()}))


def test_a_plan_is_read_as_a_plan() -> None:
    assert Share({"0": 3}).as_dict() == {"share": {"0": 3}}
    assert tz.Budget(0.5).as_dict() == {"budget": 0.5} and list(tz.Budget(1000).named()) == []
    assert tz.MaxDrop(2, HELD_OUT).as_dict() == {"max_drop": 2.0, "confidence": 0.95}
    assert list(tz.MaxDrop(2, HELD_OUT).named()) == []
