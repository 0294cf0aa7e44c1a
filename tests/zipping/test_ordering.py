"""Residual streams and aligned inputs: one order for several layers, or each its own pairs (Sec. 3.7)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from graph.orders import Net
from torch import Tensor, nn

import taskzip as tz
from taskzip.graph import Structure, analyse
from taskzip.zipping.correspondence import correspond
from taskzip.zipping.spaces import JointSpaces

DOUBLE = torch.float64


def vectors(samples: int, width: int = 5) -> Tensor:
    return torch.randn(samples, width, dtype=DOUBLE)


def residual(width: int = 7, inner: int = 6, blocks: int = 2) -> Net:
    """stem, then `blocks` times x + second(relu(first(relu(x)))), then out."""

    def do(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        for first, second in zip(m.first, m.second, strict=True):
            x = x + second(first(x.relu()).relu())
        return m.out(x.tanh())

    return Net(
        do,
        stem=nn.Linear(5, width),
        first=nn.ModuleList(nn.Linear(width, inner) for _ in range(blocks)),
        second=nn.ModuleList(nn.Linear(inner, width) for _ in range(blocks)),
        out=nn.Linear(width, 3),
    ).to(DOUBLE)


def two_writers(width: int = 5) -> Net:
    """Two layers that read the networks' input write into one space."""
    return Net(
        lambda m, x: m.out(m.a(x).relu() + m.b(x).tanh()),
        a=nn.Linear(5, width),
        b=nn.Linear(5, width),
        out=nn.Linear(width, 3),
    ).to(DOUBLE)


def reordered(model: nn.Module, seed: int, x: Tensor | None = None) -> nn.Module:
    """The same function with the units of every space in another order."""
    structure, rng = tz.inspect(model, vectors(3) if x is None else x), np.random.default_rng(seed)
    model = copy.deepcopy(model)
    for index, space in enumerate(structure.spaces):
        structure.reorder(model, index, rng.permutation(len(space.units)))
    return model


_known: dict[Any, Structure] = {}


@pytest.fixture(autouse=True)
def _one_analysis_per_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing takes as long as the analysis, and it does not look at weights."""

    def analysed(model: nn.Module, *arguments: Any) -> Structure:
        key = str(model), getattr(getattr(model, "do", None), "__code__", None)
        if key not in _known:
            _known[key] = analyse(model, *arguments)
        return _known[key]

    monkeypatch.setattr("taskzip.zipping.members.analyse", analysed)
    monkeypatch.setattr("taskzip.report.inspection.analyse", analysed)


def run_zip(models: Sequence[nn.Module], x: Sequence[Tensor], **options: Any) -> tz.ZippedModel:
    tasks = [tz.Task("abc"[t], model, [each]) for t, (model, each) in enumerate(zip(models, x, strict=True))]
    return tz.zip(tasks, **{"share": 1.0, "progress": False, "max_rows": None, **options})


def costs(zipped: tz.ZippedModel) -> dict[str, float]:
    return {record.name: record.cost for record in zipped.history.layers}


def shared(zipped: tz.ZippedModel) -> dict[str, int]:
    return {record.name: record.shared for record in zipped.history.layers}


def assert_agrees(given: nn.Module, wanted: nn.Module, x: Tensor, tolerance: float = 1e-8) -> None:
    assert (given(x) - wanted(x)).abs().max() <= tolerance * wanted(x).abs().max()


# --- which spaces need one order -----------------------------------------------------------------------------------


def joint_spaces(*models: nn.Module, how: Any = None) -> JointSpaces:
    members = [SimpleNamespace(structure=tz.inspect(model, vectors(3))) for model in models]
    names = [f"{t}" for t in range(len(models))]
    return JointSpaces(members, correspond(names, [m.structure for m in members], how))  # type: ignore[arg-type]


def test_a_stream_is_what_several_joint_layers_write() -> None:
    spaces = joint_spaces(residual(), residual())
    assert len(spaces.streams) == 1 and not spaces.twisted
    (stream,) = spaces.streams
    assert len(spaces.members_of(stream)) == 2
    chain = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).to(DOUBLE)
    assert not joint_spaces(chain, chain).streams


def test_writers_without_a_partner_make_no_stream() -> None:
    plain = Net(lambda m, x: m.out(m.stem(x).tanh()), stem=nn.Linear(5, 7), out=nn.Linear(7, 3)).to(DOUBLE)
    assert not joint_spaces(residual(), plain).streams
    assert len(joint_spaces(residual(blocks=1), residual(blocks=3)).streams) == 1


def test_a_space_that_is_read_before_it_is_written_or_split_elsewhere_is_twisted() -> None:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        state = m.start.expand(len(x), 6)
        return m.out(state + m.again(m.first(state) + m.inputs(x)))

    early = Net(
        do,
        start=torch.randn(6),
        first=nn.Linear(6, 4),
        inputs=nn.Linear(5, 4),
        again=nn.Linear(4, 6),
        out=nn.Linear(6, 3),
    ).to(DOUBLE)
    assert len(joint_spaces(early, early).twisted) == 1

    apart = Net(  # what is one space of `two_writers` are two of this
        lambda m, x: m.out(torch.cat([m.a(x).relu(), m.b(x).tanh()], 1)),
        a=nn.Linear(5, 4),
        b=nn.Linear(5, 4),
        out=nn.Linear(8, 3),
    ).to(DOUBLE)
    assert not joint_spaces(apart, apart).twisted
    for pair in ((apart, two_writers()), (two_writers(), apart)):
        spaces = joint_spaces(*pair)
        assert spaces.twisted == spaces.streams and len(spaces.twisted) == 1
        zipped = run_zip(pair, [vectors(30), vectors(30)], residual="independent")
        assert shared(zipped) == {"a": 4, "b": 4, "out": 0}


# --- coupled: one order by the summed difference -------------------------------------------------------------------


@pytest.mark.parametrize("alike", [["stem"], ["stem", "second.0"], ["second.0"], ["second.1"]])
def test_units_that_only_a_later_writer_tells_apart(alike: list[str]) -> None:
    """Writers whose first four units are all the same; the others of the stream decide."""
    model, x = residual(), vectors(60)
    with torch.no_grad():
        for name in alike:
            layer = model.get_submodule(name)
            layer.weight[:4], layer.bias[:4] = layer.weight[0].clone(), layer.bias[0].clone()
    for seed in range(3):
        copy_ = reordered(model, seed)
        zipped = run_zip([model, copy_], [x, x], compensate=bool(seed % 2))
        assert max(costs(zipped).values()) <= 1e-10
        assert list(shared(zipped).values()) == [7, 6, 7, 6, 7, 0]
        for task in "ab":
            assert_agrees(zipped[task], model, x)
            assert_agrees(zipped[task], model, 2 * x + 1)


def test_alone_the_first_writer_cannot_tell_them_apart() -> None:
    model, x = residual(), vectors(60)
    with torch.no_grad():
        model.stem.weight[:4], model.stem.bias[:4] = model.stem.weight[0].clone(), model.stem.bias[0].clone()
    zipped = [run_zip([model, reordered(model, seed)], [x, x], residual="independent") for seed in range(3)]
    assert all(costs(each)["stem"] <= 1e-10 and costs(each)["second.0"] <= 1e-10 for each in zipped)
    assert max(costs(each)["first.1"] for each in zipped) > 1e-4  # reads them in a wrong order


def literal_difference(models: Sequence[nn.Module], layer: str, x: Sequence[Tensor], balance: float) -> np.ndarray:
    """Eq. 12 for every pair of units of a layer that reads the networks' input."""
    curvatures, weights = [], []
    for model, each, alpha in zip(models, x, (balance, 1 - balance), strict=True):
        h = sum(np.outer(row, row) for row in np.column_stack([each.numpy(), np.ones(len(each))]))
        h = alpha / len(each) * h
        curvatures.append(h + 1e-2 * np.mean(np.diag(h)) * np.eye(len(h)))
        module = model.get_submodule(layer)
        weights.append(torch.cat([module.weight, module.bias[:, None]], 1).detach().numpy())
    metric = np.linalg.inv(sum(np.linalg.inv(h) for h in curvatures))
    d = np.empty((len(weights[0]), len(weights[1])))
    for i, j in np.ndindex(*d.shape):
        d[i, j] = 0.5 * (weights[0][i] - weights[1][j]) @ metric @ (weights[0][i] - weights[1][j])
    return d


@pytest.mark.parametrize("widths", [(5, 5), (4, 6), (6, 4)])
def test_the_order_has_the_least_summed_difference(widths: tuple[int, int]) -> None:
    models, x = [two_writers(width) for width in widths], [vectors(25), vectors(31)]
    a, b = (literal_difference(models, layer, x, 0.3) for layer in "ab")

    def least(d: np.ndarray) -> tuple[float, list[tuple[int, int]]]:
        d = d if d.shape[0] <= d.shape[1] else d.T
        ways = itertools.permutations(range(d.shape[1]), d.shape[0])
        return min((float(sum(d[i, j] for i, j in enumerate(way))), list(enumerate(way))) for way in ways)

    options = {"balance": 0.3, "compensate": False}
    together = costs(run_zip(models, x, **options))
    best, pairs = least(a + b)
    pairs = pairs if widths[0] <= widths[1] else [(j, i) for i, j in pairs]
    assert together["a"] + together["b"] == pytest.approx(best, rel=1e-9)
    assert together["a"] == pytest.approx(sum(a[i, j] for i, j in pairs), rel=1e-9)

    alone = costs(run_zip(models, x, residual="independent", **options))
    assert alone["a"] == pytest.approx(least(a)[0], rel=1e-9)
    assert alone["b"] == pytest.approx(least(b)[0], rel=1e-9)
    assert alone["a"] + alone["b"] < together["a"] + together["b"]


@pytest.mark.parametrize("matching", ["greedy", "random"])
def test_other_ways_of_matching(matching: str) -> None:
    models, x = [residual(), residual(8, 5)], [vectors(30), vectors(30)]
    zipped = run_zip(models, x, matching=matching, share=0.6)
    assert list(shared(zipped).values()) == [4, 3, 4, 3, 4, 0]
    again = run_zip(models, x, matching=matching, share=0.6)
    optimal = run_zip(models, x, share=0.6)
    assert costs(again) == costs(zipped)
    assert matching == "greedy" or sum(costs(zipped).values()) > sum(costs(optimal).values())
    for task, each in zip("ab", x, strict=True):
        assert torch.isfinite(zipped[task](each)).all()


def widened(model: Net, width: int, inner: int, seed: int) -> Net:
    """The same function of a wider network: the units that have been added are weak, and nothing reads them."""
    torch.manual_seed(seed)
    wide = residual(width, inner)
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            own = model.get_parameter(name)
            parameter.mul_(0.1)
            parameter[tuple(slice(size) for size in own.shape)] = own
            if own.dim() == 2:
                parameter[: own.shape[0], own.shape[1] :] = 0
    return wide


@pytest.mark.parametrize("residual_", ["coupled", "independent"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 2), (1, 0, 2), (1, 2, 0)])
def test_a_network_is_found_within_wider_ones(order: tuple[int, ...], residual_: str) -> None:
    model, x = residual(), vectors(60)
    copies = [model, reordered(widened(model, 9, 8, 1), 2), reordered(widened(model, 10, 6, 3), 4)]
    chosen = [copies[k] for k in order]
    share = {"stem": 7, "first.0": 6, "second.0": 7, "first.1": 6, "second.1": 7}
    zipped = run_zip(chosen, [x] * len(order), share=share, residual=residual_, compensate=False)
    assert max(costs(zipped).values()) <= 1e-10
    for task in zipped:
        assert_agrees(zipped[task], model, x)
    units = [record.shared for record in zipped.history.layers]
    assert units == [7, 6, 7, 6, 7, 0]


@pytest.mark.parametrize(
    ("residual_", "order"),
    [
        ("coupled", (0, 1, 2)),
        ("coupled", (0, 2, 1)),
        ("coupled", (2, 0, 1)),
        ("independent", (0, 1, 2)),
        ("independent", (0, 2, 1)),
        ("independent", (2, 0, 1)),
    ],
)
def test_writers_of_other_kernels_have_no_say(residual_: str, order: tuple[int, ...]) -> None:
    """Three copies, one of which has a stem of 1 x 1 where the others have 3 x 3 with zeros around."""
    copies, x = stems_of_different_kernels()
    zipped = run_zip([copies[k] for k in order], [x] * 3, residual=residual_)
    assert max(costs(zipped).values()) <= 1e-10
    for task in "abc":
        assert_agrees(zipped[task], copies[0], x)
    if residual_ == "coupled":
        assert list(shared(zipped).values())[1:] == [5, 6, 5, 6, 0]


def stems_of_different_kernels() -> tuple[list[nn.Module], Tensor]:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        for first, second in zip(m.first, m.second, strict=True):
            x = x + second(first(x.relu()).relu())
        return m.out(x.mean((2, 3)))

    def make(kernel: int) -> nn.Module:
        return Net(
            do,
            stem=nn.Conv2d(2, 6, kernel, padding=kernel // 2),
            first=nn.ModuleList(nn.Conv2d(6, 5, 3, padding=1) for _ in range(2)),
            second=nn.ModuleList(nn.Conv2d(5, 6, 3, padding=1) for _ in range(2)),
            out=nn.Linear(6, 3),
        ).to(DOUBLE)

    x = torch.randn(30, 2, 5, 5, dtype=DOUBLE)
    one, three = make(1), make(3)
    state = one.state_dict()
    three.load_state_dict(state | {"stem.weight": nn.functional.pad(state["stem.weight"], (1, 1, 1, 1))})
    return [reordered(each, seed, x) for seed, each in enumerate((three, three, one))], x


# --- other numbers in each layer of a stream -----------------------------------------------------------------------


@pytest.mark.parametrize("residual_", ["coupled", "independent"])
def test_each_layer_of_a_stream_may_share_another_number(residual_: str) -> None:
    models, x = [residual(), residual()], [vectors(40), vectors(44)]
    share = {"stem": 2, "second.0": 1.0, "first.1": 3, "second.1": 0.5}
    zipped = run_zip(models, x, share=share, residual=residual_, own_scale=False)
    assert shared(zipped) == {"stem": 2, "first.0": 0, "second.0": 7, "first.1": 3, "second.1": 4, "out": 0}
    # Inputs are aligned, so that a shared unit shares its weights over the whole input (design 2.1).
    saved = {"stem": 2 * 6, "first.0": 0, "second.0": 7 * 7, "first.1": 3 * 8, "second.1": 4 * 7, "out": 0}
    assert {record.name: record.before - record.after for record in zipped.history.layers} == saved
    for task, each in zip("ab", x, strict=True):
        assert torch.isfinite(zipped[task](each)).all()
        assert_agrees(zipped.materialize(task), zipped[task], each, 1e-13)


def test_a_threshold_holds_in_every_layer_of_a_stream() -> None:
    """B is A, but for two units of the stem and three of a later writer."""
    model, x = residual(), vectors(60)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.stem.weight[:2] += 0.1 * torch.randn(2, 5, dtype=DOUBLE)
        other.second[1].weight[3:6] += 0.1 * torch.randn(3, 6, dtype=DOUBLE)
    options = {"share": tz.Threshold({"stem": 1e-9, "second.1": 1e-9}), "compensate": False}
    zipped = run_zip([model, reordered(other, 3)], [x, x], **options)
    assert (shared(zipped)["stem"], shared(zipped)["second.1"]) == (5, 4)
    assert_agrees(zipped["a"], model, x)
    assert_agrees(zipped["b"], other, x)


# --- independent: each layer its own pairs, and a gather -----------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_independent_writers_find_pairs_of_their_own(share: float) -> None:
    """B's writers hold A's units in orders that do not fit together: no order of the stream serves both."""
    model, x = two_writers(), vectors(50)
    other = two_writers()
    with torch.no_grad():
        for layer, order in (("a", [3, 0, 4, 1, 2]), ("b", [1, 2, 0, 4, 3])):
            one, two = model.get_submodule(layer), other.get_submodule(layer)
            two.weight.copy_(one.weight[order])
            two.bias.copy_(one.bias[order])
    zipped = run_zip([model, other], [x, x], residual="independent", share=share, own_scale=False)
    assert costs(zipped) == pytest.approx({"a": 0, "b": 0, "out": 0}, abs=1e-12)
    units = round(5 * share)
    assert shared(zipped) == {"a": units, "b": units, "out": 0}
    assert [record.before - record.after for record in zipped.history.layers] == [6 * units, 6 * units, 0]
    for task, original in (("a", model), ("b", other)):
        assert_agrees(zipped[task], original, x)
        plain = zipped.materialize(task)
        assert_agrees(plain, zipped[task], x, 1e-13)
        hidden = plain.a(x).relu() + plain.b(x).tanh()  # densely, by hand
        assert (plain.out(hidden) - original(x)).abs().max() < 1e-10

    coupled = run_zip([model, other], [x, x], share=share)
    assert sum(costs(coupled).values()) > 1e-3


def test_independent_pairs_of_later_writers() -> None:
    model, x = residual(), vectors(60)
    other = copy.deepcopy(model)
    with torch.no_grad():  # the last writer's units in another order than those of the stream
        other.second[1].weight.copy_(model.second[1].weight.roll(3, 0))
        other.second[1].bias.copy_(model.second[1].bias.roll(3, 0))
    other = reordered(other, 5)
    zipped = run_zip([model, other], [x, x], residual="independent")
    assert max(costs(zipped).values()) <= 1e-10
    assert_agrees(zipped["a"], model, x)
    assert_agrees(zipped["b"], other, x)
    assert costs(run_zip([model, other], [x, x]))["second.1"] > 1e-3


# --- aligned inputs without streams --------------------------------------------------------------------------------


def chain() -> nn.Sequential:
    layers = [nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).to(DOUBLE)


@pytest.mark.parametrize(("aligned", "saved"), [(True, [4 * 6, 3 * 9, 0]), (None, [4 * 6, 3 * 5, 0])])
def test_aligned_inputs_share_whole_rows(aligned: bool | None, saved: list[int]) -> None:
    models, x = [chain(), chain()], [vectors(30), vectors(30)]
    zipped = run_zip(models, x, share=0.5, aligned=aligned, own_scale=False)
    assert [record.before - record.after for record in zipped.history.layers] == saved


def test_a_layer_behind_one_that_shares_nothing() -> None:
    models, x = [chain(), chain()], [vectors(30), vectors(30)]
    zipped = run_zip(models, x, share={"2": 4}, aligned=True, own_scale=False)
    assert shared(zipped) == {"0": 0, "2": 4, "4": 0}
    assert [record.before - record.after for record in zipped.history.layers] == [0, 4 * 9, 0]
    for aligned in (None, False):
        with pytest.raises(tz.InputError, match=r"layer '2' cannot be shared .no inputs in common"):
            run_zip(models, x, share={"2": 4}, aligned=aligned)


def test_aligned_copies_are_found_however_little_is_shared() -> None:
    model, x = chain(), vectors(40)
    zipped = run_zip([model, reordered(model, 1)], [x, x], share={"0": 1, "2": 5}, aligned=True)
    assert max(costs(zipped).values()) <= 1e-10
    assert shared(zipped) == {"0": 1, "2": 5, "4": 0}
    assert_agrees(zipped["b"], model, x)
