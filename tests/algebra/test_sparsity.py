"""Pruned networks stay pruned: the functions against brute force, and `zip` from end to end."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Attention
from scipy.optimize import minimize
from torch import Tensor, nn

import taskzip as tz
from taskzip.algebra.curvature import LayerStatistics
from taskzip.algebra.factored import Factored, dense
from taskzip.algebra.merging import merge_weights
from taskzip.algebra.recalibration import least_squares
from taskzip.algebra.sparsity import denser, fit, fit_on_support, solve_on_support, support, united
from taskzip.models import LeNet300

DOUBLE = torch.float64


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def mask(*shape: int, density: float = 0.5) -> Tensor:
    return torch.rand(*shape) < density


def assert_close(given_: Tensor, wanted: Tensor | np.ndarray, relative: float = 1e-7) -> None:
    wanted = torch.as_tensor(wanted).detach()
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(given_, wanted, rtol=relative, atol=relative * scale + 1e-12)


# --- which connections there are ------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(0, 5), st.integers(1, 6), st.booleans())
def test_the_support_is_what_is_not_zero(seed: int, units: int, d: int, bias: bool) -> None:
    torch.manual_seed(seed)
    w = some(units, d) * mask(units, d, density=0.8)
    before = w.clone()
    wanted = [[value != 0 or (bias and column == d - 1) for column, value in enumerate(row)] for row in w.tolist()]
    found = support(w, bias=bias)
    assert torch.equal(w, before)
    if all(map(all, wanted)):
        assert found is None
    else:
        assert found is not None
        assert found.tolist() == wanted


def test_a_negative_zero_is_missing_and_a_tiny_weight_is_not() -> None:
    found = support(torch.tensor([[-0.0, 5e-324, -1.0]], dtype=DOUBLE), bias=False)
    assert found is not None
    assert found.tolist() == [[False, True, True]]


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_of_units_that_become_one_the_denser_decides(seed: int, units: int, d: int, tasks: int) -> None:
    torch.manual_seed(seed)
    given_ = [mask(units, d, density=0.7) for _ in range(tasks)]
    wanted = torch.stack([max((each[k] for each in given_), key=lambda row: int(row.sum())) for k in range(units)])
    before = [each.clone() for each in given_]
    found = denser(given_)
    assert all(map(torch.equal, given_, before))
    assert found is None if wanted.all() else torch.equal(found, wanted)
    assert denser([*given_, None]) is None
    assert denser([None, *given_]) is None


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_united_has_what_any_has(seed: int, units: int, d: int, tasks: int) -> None:
    torch.manual_seed(seed)
    given_ = [mask(units, d, density=0.7) for _ in range(tasks)]
    wanted = [[any(bool(each[k, i]) for each in given_) for i in range(d)] for k in range(units)]
    found = united(given_)
    assert found is None if all(map(all, wanted)) else found.tolist() == wanted
    assert united([*given_, None]) is None


def test_units_with_the_connections_of_both_lose_less() -> None:
    """And weights are 0 where neither network has a connection, and nowhere else."""
    torch.manual_seed(0)
    models = [pruned(LeNet300(16, hidden=(12, 10), classes=3), 0.3) for _ in range(2)]
    x = torch.randn(400, 16)
    tasks = [tz.Task(name, model, [x]) for name, model in zip("ab", models, strict=True)]
    options = {"share": 1.0, "progress": False, "compensate": False}
    least, most = (tz.zip(tasks, connections=each, **options) for each in ("denser", "any"))
    apart = sum(int(p.count_nonzero()) for model in models for p in model.parameters())
    assert least.connection_count() < most.connection_count() <= apart
    costs = [sum(record.cost for record in each.history.layers[:1]) for each in (least, most)]
    assert costs[0] == costs[1] > 0  # pairs are chosen alike
    wrong = [
        sum(
            float((each[name](x) - model(x)).detach().square().mean()) for name, model in zip("ab", models, strict=True)
        )
        for each in (least, most)
    ]
    assert wrong[1] < wrong[0]


def test_between_equally_many_the_first_decides() -> None:
    first, second = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    assert torch.equal(denser([first, second]), first)
    assert torch.equal(denser([second, first]), second)


# --- solving over them ----------------------------------------------------------------------------------------------


def solved_by_numpy(rows: Tensor, targets: Tensor, exists: Tensor | None) -> np.ndarray:
    """Column by column over its own support; the shortest solution where there are many."""
    found = np.zeros((rows.shape[1], targets.shape[1]))
    for k in range(targets.shape[1]):
        places = np.arange(rows.shape[1]) if exists is None else np.flatnonzero(exists[k].numpy())
        found[places, k] = np.linalg.lstsq(rows.numpy()[:, places], targets.numpy()[:, k], rcond=1e-9)[0]
    return found


def supports(units: int, d: int) -> Tensor:
    """At random; one unit has all connections, one only the last (as a bias is), and one none at all."""
    exists = mask(units, d)
    exists[:, -1] = True
    exists[1], exists[2, :-1], exists[3] = True, False, False
    return exists


@pytest.mark.parametrize("n, d, damping", [(20, 7, 0.0), (20, 7, 0.1), (4, 9, 0.1), (4, 9, 0.0)])
def test_solving_is_least_squares_over_the_support(n: int, d: int, damping: float) -> None:
    """Also where H is singular: there are more connections than rows and no damping."""
    rows = torch.cat([some(n, d), damping**0.5 * torch.eye(d, dtype=DOUBLE)])
    targets, exists = some(len(rows), 6), supports(6, d)
    for each in (exists, None, torch.ones_like(exists)):
        found = solve_on_support(rows.mT @ rows, rows.mT @ targets, each)
        assert_close(found, solved_by_numpy(rows, targets, each))
        if each is not None:
            assert (found.mT[~each] == 0).all()


def test_nothing_to_solve() -> None:
    h, right = some(4, 4), some(4, 0)
    assert solve_on_support(h @ h.mT, right, torch.ones(0, 4, dtype=torch.bool)).shape == (4, 0)


@pytest.mark.parametrize("diagonal", [torch.full((9,), 0.1), 0.1 + torch.arange(9) % 2])
@pytest.mark.parametrize("n", [1, 4, 20])
def test_fitting_few_rows_is_least_squares_over_the_support(n: int, diagonal: Tensor) -> None:
    h = Factored(some(n, 9), diagonal.double())
    answers, prior, exists = some(n, 6), some(6, 9), supports(6, 9)
    found = fit_on_support(h, answers, prior, exists)
    pull = h.diagonal.sqrt()
    rows, targets = torch.cat([h.rows, torch.diag(pull)]), torch.cat([answers, pull[:, None] * prior.mT])
    assert_close(found.mT, solved_by_numpy(rows, targets, exists))
    assert (found[~exists] == 0).all()
    assert_close(fit(h, answers, prior).mT, solved_by_numpy(rows, targets, None))
    assert_close(fit_on_support(h, answers, prior, torch.ones_like(exists)), fit(h, answers, prior))


def test_what_few_rows_do_not_tell_stays_as_it_was() -> None:
    """Not even a pull is needed for that; along the rows the answers are given."""
    h = Factored(some(3, 9), torch.zeros(9, dtype=DOUBLE))
    answers, prior, exists = some(3, 4), some(4, 9), mask(4, 9, density=0.7)
    for found, where in ((fit(h, answers, prior), exists | True), (fit_on_support(h, answers, prior, exists), exists)):
        for k in range(4):
            rows = h.rows[:, where[k]]
            apart = (found - prior)[k, where[k]]
            assert_close(rows @ found[k, where[k]], answers[:, k])
            _, _, basis = torch.linalg.svd(rows)
            assert_close(basis[3:] @ apart, torch.zeros(len(basis) - 3, dtype=DOUBLE))


# --- merging --------------------------------------------------------------------------------------------------------


def curvatures(forms: str, d: int) -> list[Tensor | Factored]:
    """Of different sizes, damped differently: "d" as a matrix, "f" factored."""
    found = []
    for k, form in enumerate(forms):
        h = Factored((k + 1) * some(3, d), torch.full((d,), 0.1 * (k + 1), dtype=DOUBLE))
        found.append(h if form == "f" else h.dense())
    return found


def error(w: Tensor, parents: Sequence[Tensor], hs: Sequence[Tensor | Factored]) -> Tensor:
    """Per unit, the summed rise of the layer error: sum over t of 1/2 (w - w_t)^T H_t (w - w_t)."""
    return sum(0.5 * ((w - p) @ dense(h) * (w - p)).sum(1) for p, h in zip(parents, hs, strict=True))


@pytest.mark.parametrize("forms", ["dd", "ff", "df", "fd", "dfd", "fff"])
def test_merged_weights_are_the_best_with_their_support(forms: str) -> None:
    d, units = 8, 5
    hs = curvatures(forms, d)
    parents = [some(units, d) * mask(units, d) for _ in forms]
    exists = denser([p != 0 for p in parents])
    merged = merge_weights(parents, hs, exists)
    assert exists is not None
    assert (merged[~exists] == 0).all()
    assert (merged[exists] != 0).all()

    roots = [torch.linalg.cholesky(dense(h)).mT for h in hs]
    targets = torch.cat([r @ p.mT for r, p in zip(roots, parents, strict=True)])
    assert_close(merged.mT, solved_by_numpy(torch.cat(roots), targets, exists))

    least = error(merged, parents, hs)
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(10):
            assert (error(merged + size * some(units, d) * exists, parents, hs) >= least - 1e-9).all()
    variable = merged.clone().requires_grad_()
    error(variable, parents, hs).sum().backward()
    assert variable.grad is not None
    assert variable.grad[exists].abs().max() < 1e-9
    assert variable.grad[~exists].abs().max() > 1e-3  # without the zeros it would be less


def test_a_minimiser_that_knows_nothing_of_matrices_finds_the_same() -> None:
    d = 6
    hs, parents = curvatures("dd", d), [some(1, d) * mask(1, d, density=0.7) for _ in range(2)]
    exists = torch.tensor([[True, False, True, True, False, True]])

    def value(free: np.ndarray) -> float:
        w = torch.zeros(1, d, dtype=DOUBLE)
        w[exists] = torch.from_numpy(free)
        return error(w, parents, hs).item()

    found = minimize(value, np.zeros(4), method="BFGS", options={"gtol": 1e-9})
    assert_close(merge_weights(parents, hs, exists)[exists], found.x, 1e-5)


@pytest.mark.parametrize("forms", ["dd", "ff"])
def test_a_support_of_everything_is_no_support(forms: str) -> None:
    hs, parents = curvatures(forms, 7), [some(4, 7), some(4, 7)]
    given_ = merge_weights(parents, hs, torch.ones(4, 7, dtype=torch.bool))
    assert_close(given_, merge_weights(parents, hs))


@pytest.mark.parametrize("forms", ["dd", "ff"])
def test_equal_parents_with_zeros_stay_as_they_are(forms: str) -> None:
    w = some(4, 7) * mask(4, 7)
    merged = merge_weights([w, w.clone()], curvatures(forms, 7), w != 0)
    assert_close(merged, w, 1e-13)
    assert torch.equal(merged != 0, w != 0)


def test_an_input_that_nobody_reads_takes_the_weight_of_the_one_who_knows() -> None:
    """H of the first task is 0 along input 1 (fictive), so that the second task's weight holds there."""
    h_a, h_b = curvatures("dd", 4)
    h_a[1] = h_a[:, 1] = 0
    parent = torch.tensor([[1.0, 2.0, 0.0, 3.0]], dtype=DOUBLE)
    fictive = parent.clone()
    fictive[0, 1] = 0
    assert_close(merge_weights([fictive, parent], [h_a, h_b], parent != 0), parent)


# --- least squares --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [5, 40])
def test_compensation_is_least_squares_over_the_support(
    rows: int, bias: bool, factored: bool, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    d, units = 9, 5
    if factored:
        monkeypatch.setattr("taskzip.algebra.curvature._SMALL", 0)
        monkeypatch.setattr("taskzip.algebra.curvature._FEW", 100.0)
    x, z, now = some(rows, d) + 0.5, some(rows, units), some(units, d + 1) * mask(units, d + 1, density=0.6)
    now[:, 0] = 1.0  # at least one connection each
    now[0, 1:-1] = 0.0
    now[1] = 2.0
    if bias:
        now[3, -1] = 0.0  # a bias exists even where it is 0
    else:
        now[:, -1] = 0.0
    statistics = LayerStatistics(d, units, torch.device("cpu"))
    for part_x, part_z in zip(x.split(20), z.split(20), strict=True):
        statistics.update(part_x, part_z)
    assert isinstance(statistics.curvature, Factored) == factored

    found = least_squares(statistics, now, ridge, bias=bias)

    width = d + 1 if bias else d
    exists = now[:, :width] != 0
    exists[:, width - 1] |= bias
    inputs = torch.cat([x, torch.ones(rows, 1, dtype=DOUBLE)], 1)[:, :width]
    pull = (ridge * inputs.square().sum(0)).sqrt().diag()
    stacked = torch.cat([inputs, pull])
    targets = torch.cat([z, pull @ now[:, :width].mT])
    assert_close(found[:, :width].mT, solved_by_numpy(stacked, targets, exists))
    assert torch.equal(found[:, :width] != 0, exists)
    assert torch.equal(found[:, width:], now[:, width:])

    def loss(w: Tensor) -> Tensor:
        return (stacked @ w.mT - targets).square().sum(0)

    for _ in range(10):
        assert (loss(found[:, :width] + 0.1 * some(units, width) * exists) >= loss(found[:, :width])).all()


@pytest.mark.parametrize("factored", [False, True])
def test_compensation_without_a_ridge_and_with_few_rows_stays_as_near_as_it_can(
    factored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if factored:
        monkeypatch.setattr("taskzip.algebra.curvature._SMALL", 0)
        monkeypatch.setattr("taskzip.algebra.curvature._FEW", 100.0)
    x, z, now = some(3, 9), some(3, 4), some(4, 10) * mask(4, 10, density=0.7)
    now[:, -1] = 1.0
    statistics = LayerStatistics(9, 4, torch.device("cpu"))
    statistics.update(x, z)
    inputs = torch.cat([x, torch.ones(3, 1, dtype=DOUBLE)], 1)
    change = solved_by_numpy(inputs, z - inputs @ now.mT, now != 0)
    assert_close((least_squares(statistics, now, 0.0, bias=True) - now).mT, change)


def test_compensation_leaves_a_pruned_layer_that_fits() -> None:
    x, w = some(6, 9), some(3, 10) * mask(3, 10)
    w[:, -1] = 1.0
    statistics = LayerStatistics(9, 3, torch.device("cpu"))
    statistics.update(x, x @ w[:, :-1].mT + w[:, -1])
    assert_close(least_squares(statistics, w, 1e-3, bias=True), w)


# --- networks whose units can be recognised ---------------------------------------------------------------------------
#
# Behind every hidden layer is a PReLU with a slope of its own for each unit, which zipping moves but never changes: the
# slopes tell which unit of the original network stands where.


class Place(NamedTuple):
    """A layer, and the PReLUs whose units it reads and computes ("" for the input and the output)."""

    layer: str
    reads: str
    writes: str


def tagged(units: int) -> nn.PReLU:
    prelu = nn.PReLU(units)
    with torch.no_grad():
        prelu.weight.copy_(0.1 + 0.3 * torch.rand(units))
    return prelu


def fc(*widths: int, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for reads, units in itertools.pairwise(widths):
        layers += [nn.Linear(reads, units, bias=bias), tagged(units)]
    return nn.Sequential(*layers[:-1]).to(DOUBLE)


def cnn(channels: int = 1, kernels: tuple[int, int] = (4, 5), units: int = 6, *, bias: bool = True) -> nn.Sequential:
    """For images of 7 x 7."""
    first, second = kernels
    return nn.Sequential(
        nn.Conv2d(channels, first, 3, stride=2, padding=1, bias=bias),
        tagged(first),
        nn.Conv2d(first, second, 2, bias=bias),
        tagged(second),
        nn.Flatten(),
        nn.Linear(second * 9, units, bias=bias),
        tagged(units),
        nn.Linear(units, 3),
    ).to(DOUBLE)


class Residual(nn.Module):
    """A stream to which a branch adds."""

    def __init__(self, width: int = 7, inner: int = 5) -> None:
        super().__init__()
        self.stem, self.act0 = nn.Linear(4, width), tagged(width)
        self.up, self.act1 = nn.Linear(width, inner), tagged(inner)
        self.down, self.act2 = nn.Linear(inner, width), tagged(width)
        self.out = nn.Linear(width, 3)
        self.to(DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act0(self.stem(x))
        return self.out(self.act2(x + self.down(self.act1(self.up(x)))))


def layout(model: nn.Module) -> list[Place]:
    if isinstance(model, Residual):
        return [
            Place("stem", "", "act0"),
            Place("up", "act0", "act1"),
            Place("down", "act1", "act2"),
            Place("out", "act2", ""),
        ]
    names = [name for name, m in model.named_children() if isinstance(m, (nn.Linear, nn.Conv2d))]
    tags = [name for name, m in model.named_children() if isinstance(m, nn.PReLU)]
    return [Place(*each) for each in zip(names, ["", *tags], [*tags, ""], strict=True)]


def pruned(model: nn.Module, density: float) -> nn.Module:
    """Keeps a random part of the weights, but at least one of each unit, and biases that are not 0."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                keep = mask(*module.weight.shape, density=density)
                flat = keep.flatten(1)
                flat[torch.arange(len(flat)), torch.randint(flat.shape[1], (len(flat),))] = True
                module.weight *= flat.view_as(keep)
    return model


def vectors(samples: int, width: int) -> Tensor:
    return some(samples, width) @ some(width, width) / width**0.5 + 0.3


def images(samples: int, channels: int = 1) -> Tensor:
    return some(samples, channels, 7, 7)


def as_tasks(models: Sequence[nn.Module], data: Sequence[Tensor]) -> list[tz.Task]:
    return [tz.Task("abc"[i], m, [x]) for i, (m, x) in enumerate(zip(models, data, strict=True))]


def run_zip(models: Sequence[nn.Module], data: Sequence[Tensor], **options: Any) -> tz.ZippedModel:
    return tz.zip(as_tasks(models, data), **{"share": 1.0, "progress": False, "max_rows": None, **options})


def weight_of(model: nn.Module, place: Place) -> Tensor:
    return model.get_submodule(place.layer).weight.detach()


def own_masks(zipped: nn.Module, original: nn.Module) -> list[Tensor]:
    """Per layer, which connections the original network had, in the order in which the units lie now."""

    def order(tag: str) -> Tensor:
        now, before = (m.get_submodule(tag).weight for m in (zipped, original))
        found = now[:, None] == before[None]
        assert (found.sum(1) == 1).all()
        return found.int().argmax(1)

    masks = []
    for place in layout(original):
        exists = weight_of(original, place) != 0
        if place.reads:
            units = order(place.reads)
            run = exists.shape[1] // len(units)
            exists = exists[:, (units[:, None] * run + torch.arange(run)).ravel()]
        masks.append(exists[order(place.writes)] if place.writes else exists)
    return masks


def numbered(zipped: tz.ZippedModel) -> tz.ZippedModel:
    """A copy in which every weight is a number of its own: what has equal numbers is one parameter."""
    zipped, start = copy.deepcopy(zipped), 0
    with torch.no_grad():
        for name, p in zipped.named_parameters():
            if ":" in name:
                p.fill_(1.0)  # a scale
                continue
            p.copy_(torch.arange(start, start + p.numel()).reshape(p.shape))
            start += p.numel()
    return zipped


class Side(NamedTuple):
    """One layer of one task: whether weights are not 0 now, whether they were not, and which parameters they are."""

    now: np.ndarray
    own: np.ndarray
    numbers: np.ndarray


def sides_of(zipped: tz.ZippedModel, models: Sequence[nn.Module]) -> list[list[Side]]:
    """Per layer, the sides of all tasks."""
    numbers = numbered(zipped)
    tasks = []
    for name, model in zip(zipped, models, strict=True):
        sides = []
        for place, own in zip(layout(model), own_masks(zipped[name], model), strict=True):
            each = (weight_of(zipped[name], place) != 0, own, weight_of(numbers[name], place).long())
            sides.append(Side(*(x.flatten(1).numpy() for x in each)))
        tasks.append(sides)
    return [list(each) for each in zip(*tasks, strict=True)]


class Joining(NamedTuple):
    """A unit of a task joins a unit that others own: how many connections each of them has from common inputs."""

    joint: int
    new: int


def check_zeros(sides: Sequence[Side]) -> list[Joining]:
    """Weights are 0 exactly where they must be.

    What a task does not share has its own zeros. Units that are shared have those of the denser one, over the inputs
    that both of them have; tasks join one after another.
    """
    places: dict[int, dict[int, tuple[int, int]]] = {}  # per parameter and task, where it stands
    for t, side in enumerate(sides):
        for place, number in np.ndenumerate(side.numbers):
            places.setdefault(int(number), {})[t] = place
    units: dict[tuple[int, int], dict[int, list[int]]] = {}  # per unit, its parameters by task
    for number, users in places.items():
        if len(users) == 1:
            ((t, place),) = users.items()
            assert sides[t].now[place] == sides[t].own[place]
        else:
            rows = {(t, row) for t, (row, _) in users.items()}
            known = next((units[each] for each in rows if each in units), {})
            for each in rows:
                assert units.setdefault(each, known) is known
            for t in users:
                known.setdefault(t, []).append(number)
    joinings = []
    for parameters in {id(unit): unit for unit in units.values()}.values():
        decided: dict[int, bool] = {}
        first, *others = sorted(parameters)
        owners = {first}
        for t in others:
            common = [number for number in parameters[t] if owners & places[number].keys()]
            own = {number: bool(sides[t].own[places[number][t]]) for number in common}
            joint = {}
            for number in common:
                before = min(owners & places[number].keys())
                joint[number] = decided.get(number, bool(sides[before].own[places[number][before]]))
            joinings.append(Joining(sum(joint.values()), sum(own.values())))
            decided |= own if joinings[-1].new > joinings[-1].joint else joint
            owners.add(t)
        for number, exists in decided.items():
            assert all(sides[t].now[place] == exists for t, place in places[number].items())
    return joinings


def connections(model: nn.Module) -> int:
    return sum(int(weight_of(model, place).count_nonzero()) for place in layout(model))


Case = Callable[[], tuple[list[nn.Module], list[Tensor]]]

CASES: dict[str, Case] = {
    "mlp": lambda: ([pruned(fc(5, 9, 7, 3), 0.6), pruned(fc(5, 9, 7, 3), 0.5)], [vectors(40, 5), vectors(30, 5)]),
    "widths": lambda: ([pruned(fc(4, 9, 6, 3), 0.5), pruned(fc(7, 8, 8, 2), 0.6)], [vectors(30, 4), vectors(40, 7)]),
    "inputs": lambda: ([pruned(fc(7, 6, 8, 2), 0.5), pruned(fc(3, 8, 6, 3), 0.7)], [vectors(40, 7), vectors(30, 3)]),
    "no bias": lambda: (
        [pruned(cnn(bias=False), 0.7), pruned(cnn(kernels=(5, 4)), 0.6)],
        [images(12), images(9)],
    ),
    "cnn": lambda: ([pruned(cnn(3, (5, 4), 5), 0.5), pruned(cnn(1, (4, 6)), 0.6)], [images(12, 3), images(9)]),
    "dense": lambda: ([fc(4, 8, 7, 3), pruned(fc(4, 8, 7, 3), 0.5)], [vectors(30, 4), vectors(40, 4)]),
    "few rows": lambda: (
        [pruned(fc(30, 9, 7, 3), 0.3), pruned(fc(30, 9, 7, 3), 0.3)],
        [vectors(6, 30), vectors(7, 30)],
    ),
    "residual": lambda: ([pruned(Residual(), 0.5), pruned(Residual(8, 4), 0.6)], [vectors(40, 4), vectors(30, 4)]),
}


@pytest.mark.parametrize(
    "case, compensate, share",
    [
        *((case, True, 1.0) for case in CASES),
        *((case, True, 0.5) for case in ("inputs", "cnn", "residual")),
        *((case, False, share) for case, share in (("widths", 0.5), ("residual", 1.0))),
    ],
)
def test_zeros_stay_zeros(case: str, compensate: bool, share: float) -> None:
    models, data = CASES[case]()
    zipped = run_zip(models, data, share=share, compensate=compensate)
    sides = sides_of(zipped, models)
    joinings = [joining for layer in sides for joining in check_zeros(layer)]
    assert joinings
    if share == 1.0:  # each of the networks decides about some units
        assert case == "dense" or any(each.joint < each.new for each in joinings)
        assert any(each.joint > each.new for each in joinings)
    for record in zipped.history.layers[:-1]:
        assert record.shared == round(share * min(record.units))
    for name, x in zip(zipped, data, strict=True):
        assert torch.isfinite(zipped[name](x)).all()

    apart = [connections(model) for model in models]
    assert zipped.history.settings["connections"] == dict(zip("ab", apart, strict=True))
    assert zipped.connection_count() <= sum(apart)
    values = {  # each parameter once
        number: now
        for layer in sides
        for side in layer
        for number, now in zip(side.numbers.ravel(), side.now.ravel(), strict=True)
    }
    assert zipped.connection_count() == sum(values.values())
    wanted = f"{sum(apart)} connections apart, {zipped.connection_count()} together (weights not 0)."
    assert wanted in zipped.summary().splitlines()


@pytest.mark.parametrize("options", [{"residual": "independent", "matching": "greedy"}, {"aligned": False}])
def test_zeros_stay_zeros_in_a_residual_network_however_it_is_zipped(options: dict[str, Any]) -> None:
    models, data = CASES["residual"]()
    zipped = run_zip(models, data, share=0.6, **options)
    for layer in sides_of(zipped, models):
        check_zeros(layer)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_of_three_tasks_the_denser_decides_one_after_another(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskzip.zipping.algorithm.joining_order", lambda members, layers: [0, 1, 2])
    models = [pruned(fc(n, 8, 9, 7, 3), density) for n, density in ((4, 0.5), (6, 0.6), (5, 0.55))]
    zipped = run_zip(models, [vectors(30, n) for n in (4, 6, 5)], share=share, own_scale=False)
    sides = sides_of(zipped, models)
    joinings = [joining for layer in sides for joining in check_zeros(layer)]
    assert any(each.joint < each.new for each in joinings)
    assert any(each.joint > each.new for each in joinings)
    blocks = {name.rpartition(".")[2] for name, _ in zipped.named_parameters() if "_blocks." in name}
    assert ("a+b+c@a+c" in blocks) == (share < 1)
    assert zipped.connection_count() <= sum(map(connections, models))


def test_a_few_rows_give_what_matrices_give(monkeypatch: pytest.MonkeyPatch) -> None:
    models, data = CASES["few rows"]()
    wanted = run_zip(models, data, share=0.7)
    monkeypatch.setattr("taskzip.algebra.curvature._SMALL", 0)
    monkeypatch.setattr("taskzip.algebra.curvature._FEW", 100.0)
    zipped = run_zip(models, data, share=0.7)
    for layer in sides_of(zipped, models):
        check_zeros(layer)
    for name, x in zip(zipped, data, strict=True):
        assert_close(zipped[name](x), wanted[name](x), 1e-6)


# --- a pruned network and its copies ----------------------------------------------------------------------------------


def permuted(model: nn.Module) -> nn.Module:
    """The same function with the hidden units of every layer in another order."""
    model = copy.deepcopy(model)
    orders = {}
    with torch.no_grad():
        for place in layout(model):
            for tag in filter(None, (place.reads, place.writes)):
                if tag not in orders:
                    orders[tag] = torch.randperm(len(model.get_submodule(tag).weight))
                if isinstance(model, Residual):
                    orders["act2"] = orders["act0"]
            layer = model.get_submodule(place.layer)
            if place.reads:
                order = orders[place.reads]
                run = layer.weight.shape[1] // len(order)
                layer.weight.copy_(layer.weight[:, (order[:, None] * run + torch.arange(run)).ravel()])
            if place.writes:
                for parameter in [*layer.parameters(), model.get_submodule(place.writes).weight]:
                    parameter.copy_(parameter[orders[place.writes]])
    return model


def pruned_mlp() -> tuple[nn.Module, Tensor]:
    return pruned(fc(5, 9, 8, 3), 0.5), vectors(60, 5)


def pruned_cnn() -> tuple[nn.Module, Tensor]:
    return pruned(cnn(bias=False), 0.6), images(20)


def pruned_residual() -> tuple[nn.Module, Tensor]:
    return pruned(Residual(), 0.6), vectors(60, 4)


@pytest.mark.parametrize(
    "make, other, share",
    [
        (pruned_mlp, copy.deepcopy, 0.4),
        (pruned_mlp, permuted, 1.0),
        (pruned_cnn, permuted, 0.6),
        (pruned_residual, permuted, 0.4),
        (pruned_residual, permuted, 1.0),
    ],
)
def test_a_pruned_network_and_a_copy_of_it_change_nothing(
    make: Callable[[], tuple[nn.Module, Tensor]], other: Callable[[nn.Module], nn.Module], share: float
) -> None:
    model, x = make()
    models = [model, other(model)]
    assert_close(models[1](x), model(x), 1e-12)
    zipped = run_zip(models, [x, x], share=share)
    for name in "ab":
        assert_close(zipped[name](x), model(x))
        assert_close(zipped[name](2 * x + 1), model(2 * x + 1))
    for layer in sides_of(zipped, models):
        for side in layer:
            np.testing.assert_array_equal(side.now, side.own)
    if share == 1.0:
        last = int(weight_of(model, layout(model)[-1]).count_nonzero())
        assert zipped.connection_count() == connections(model) + last


def pruned_attention(density: float) -> Attention:
    model = Attention().to(DOUBLE)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p *= mask(*p.shape, density=density)
    return model


def test_heads_of_pruned_networks() -> None:
    models, x = [pruned_attention(0.6), pruned_attention(0.5)], vectors(80, 4).reshape(16, 5, 4)
    weights = [sum(int(p.count_nonzero()) for p in m.parameters() if p.dim() > 1) for m in models]
    zipped = run_zip(models, [x, x], share=0.5)
    assert any(r.shared for r in zipped.history.layers[1:])
    assert list(zipped.history.settings["connections"].values()) == weights
    assert zipped.connection_count() < sum(weights)

    itself = run_zip([models[0], copy.deepcopy(models[0])], [x, x])
    for name in "ab":
        assert_close(itself[name](x), models[0](x))
    assert itself.connection_count() == weights[0] + int(models[0].out.weight.count_nonzero())


# --- what is said of it -----------------------------------------------------------------------------------------------


class Normed(nn.Sequential):
    def __init__(self, inputs: int) -> None:
        super().__init__(
            nn.Linear(inputs, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)
        )
        self.eval().to(DOUBLE)


@pytest.mark.parametrize(
    "make, options", [(lambda n: fc(n, 6, 5, 3), {"share": 1.0}), (Normed, {"share": 0.5, "compensate": False})]
)
def test_of_dense_networks_connections_are_never_mentioned(
    make: Callable[[int], nn.Module], options: dict[str, Any]
) -> None:
    """Not even where an input of one network is larger, so that the other one has fictive connections of weight 0."""
    models, data = [make(4), make(7)], [vectors(20, 4), vectors(20, 7)]
    zipped = run_zip(models, data, **options)
    assert "connection" not in zipped.summary()
    assert zipped.connection_count() == sum(p.numel() for p in {p for weight in zipped.layer_weights() for p in weight})
    tz.retrain(zipped, as_tasks(models, data), steps=1, loss="distill", progress=False)
    assert "connection" not in zipped.summary()


# --- retraining, saving and loading -----------------------------------------------------------------------------------


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=0.1)


def zero_biases(models: Sequence[nn.Module]) -> None:
    with torch.no_grad():
        for model in models:
            for place in layout(model):
                model.get_submodule(place.layer).bias[::2] = 0


@pytest.mark.parametrize("case, optimizer", [("widths", sgd), ("cnn", sgd), ("dense", None), ("residual", None)])
def test_retraining_keeps_zeros_and_moves_the_rest(case: str, optimizer: Any) -> None:
    models, data = CASES[case]()
    zero_biases(models)
    zipped = run_zip(models, data, share=0.7)
    with torch.no_grad():
        for p in zipped.parameters():  # so that there is something to learn
            p *= 1 + torch.rand_like(p)
    before = {name: p.clone() for name, p in zipped.named_parameters()}
    weights = {
        name
        for name, p in zipped.named_parameters()
        if any(p is each for weight in zipped.layer_weights() for each in weight)
    }
    count, originals = zipped.connection_count(), copy.deepcopy([model.state_dict() for model in models])
    tz.retrain(zipped, as_tasks(models, data), steps=6, loss="distill", optimizer=optimizer, progress=False)
    for name, p in zipped.named_parameters():
        if name in weights:
            assert torch.equal(p == 0, before[name] == 0), name
        assert not torch.equal(p, before[name]), name
    moved = torch.cat([(p != before[name])[before[name] != 0] for name, p in zipped.named_parameters()])
    assert moved.double().mean() > 0.7
    biases = torch.cat([p for name, p in zipped.named_parameters() if "bias" in name])
    assert (biases != 0).double().mean() > 0.7  # a bias that is 0 exists
    assert zipped.connection_count() == count
    for name, model, state in zip(zipped, models, originals, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        plain = zipped.materialize(name)
        for place in layout(model):
            assert torch.equal(weight_of(plain, place), weight_of(zipped[name], place))


def test_retraining_after_each_layer_keeps_zeros() -> None:
    models, data = CASES["mlp"]()
    for module in (m for model in models for m in model if isinstance(m, nn.PReLU)):
        module.requires_grad_(False)  # they tell the units apart
    zipped = run_zip(models, data, retrain=tz.Retraining(3, loss="distill"))
    for layer in sides_of(zipped, models):
        assert check_zeros(layer) or layer[0].now.shape[0] == 3
    assert zipped.connection_count() <= sum(map(connections, models))


def test_retraining_keeps_a_block_of_nothing_but_zeros() -> None:
    """Two units of task b stay its own, and nothing of the next layer reads them any more."""
    models, data = [fc(4, 6, 5, 3), fc(4, 8, 5, 3)], [vectors(30, 4), vectors(30, 4)]
    with torch.no_grad():
        models[1][0].weight[:2] *= 100
        models[1][2].weight[:, :2] = 0
    zipped = run_zip(models, data, compensate=False)
    assert not zipped["b"][2].weight_blocks.get_parameter("a+b@b").any()
    count = zipped.connection_count()
    tz.retrain(zipped, as_tasks(models, data), steps=2, loss="distill", progress=False)
    assert zipped.connection_count() == count


def test_a_layer_of_nothing_but_zeros_is_not_pruned_but_starts_there() -> None:
    models, data = [fc(4, 6, 3), fc(4, 6, 3)], [vectors(30, 4), vectors(30, 4)]
    nn.init.zeros_(models[0][2].weight)
    zipped = run_zip(models, data)
    targets = [[(x, x[:, :3].argmax(1))] for x in data]
    tasks = [tz.Task(name, m, each) for name, m, each in zip("ab", models, targets, strict=True)]
    tz.retrain(zipped, tasks, steps=1, progress=False)
    assert zipped["a"][2].weight.all()


@pytest.mark.parametrize("case", ["widths", "residual"])
def test_zeros_are_saved_and_loaded_bit_for_bit(case: str, tmp_path: Path) -> None:
    models, data = CASES[case]()
    zipped = run_zip(models, data, share=0.6)
    zipped.save(tmp_path / "joint.safetensors")
    fresh = {name: copy.deepcopy(model) for name, model in zip("ab", models, strict=True)}
    for model in fresh.values():
        for p in model.parameters():
            nn.init.ones_(p)
    loaded = tz.load(tmp_path / "joint.safetensors", fresh)
    for name, x in zip("ab", data, strict=True):
        assert torch.equal(loaded[name](x), zipped[name](x))
        plain = loaded.materialize(name)
        for place in layout(models["ab".index(name)]):
            weight = weight_of(zipped[name], place)
            assert torch.equal(weight_of(loaded[name], place), weight)
            assert torch.equal(weight_of(plain, place), weight)
    assert loaded.connection_count() == zipped.connection_count()
    assert loaded.summary() == zipped.summary()
    tz.retrain(loaded, as_tasks(models, data), steps=1, loss="distill", progress=False)
    assert loaded.connection_count() == zipped.connection_count()


# --- units without connections ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_units_without_any_connection(bias: bool) -> None:
    models, data = [pruned(fc(5, 9, 7, 3, bias=bias), 0.6) for _ in range(2)], [vectors(40, 5), vectors(30, 5)]
    with torch.no_grad():
        for model in models:
            model[0].weight[2:] = 0
            model[2].weight[1:3] = 0
            model[4].weight[0] = 0
    zipped = run_zip(models, data)
    for layer in sides_of(zipped, models):
        check_zeros(layer)
    for name, x in zip("ab", data, strict=True):
        assert torch.isfinite(zipped[name](x)).all()
