"""Curvatures of few rows: everything that is done with them gives what dense matrices give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import taskzip as tz
from taskzip.algebra.curvature import LayerStatistics, damped
from taskzip.algebra.difference import functional_difference
from taskzip.algebra.factored import Factored, dense, quadratic, restricted, span_of
from taskzip.algebra.merging import merge_weights
from taskzip.algebra.recalibration import batch_norm_statistics, least_squares, match_spread

DOUBLE = torch.float64
CPU = torch.device("cpu")
D = 60


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def factored(n: int, d: int = D, damping: float = 1e-2) -> Factored:
    """Rows of very different length, with a constant input, as a layer behind a ReLU reads them."""
    rows = some(n, d).relu() * torch.logspace(-1, 1, n, dtype=DOUBLE)[:, None]
    rows[:, -1] = 1
    return damped(Factored(rows, torch.zeros(d, dtype=DOUBLE)), damping)


def without(h: Factored, columns: list[int]) -> Factored:
    """The same with fictive connections."""
    real = torch.tensor([c for c in range(len(h)) if c not in columns])
    return restricted(h, real).placed(real, len(h))


def assert_close(given_: Tensor, wanted: Tensor, relative: float = 1e-9) -> None:
    torch.testing.assert_close(given_, wanted, rtol=relative, atol=relative * float(wanted.abs().max()))


# --- the matrix ---------------------------------------------------------------------------------------------------


def test_is_its_rows_and_its_diagonal() -> None:
    h = Factored(some(3, 5), some(5).abs())
    wanted = h.rows.mT @ h.rows + torch.diag(h.diagonal)
    assert_close(h.dense(), wanted)
    assert_close(dense(h), wanted)
    assert dense(wanted) is wanted
    assert len(h) == 5


def test_is_scaled_damped_restricted_and_placed() -> None:
    h = Factored(some(3, 5), some(5).abs())
    columns, places = torch.tensor([4, 0, 3]), torch.tensor([6, 1, 2])
    assert_close(dense(0.3 * h), 0.3 * dense(h))
    assert_close(dense(damped(h, 0.1)), damped(dense(h), 0.1))
    for chosen in (columns, slice(1, 4)):
        assert_close(dense(restricted(h, chosen)), restricted(dense(h), chosen))
    placed = torch.zeros(7, 7, dtype=DOUBLE)
    placed[places[:, None], places] = dense(restricted(h, columns))
    assert_close(dense(restricted(h, columns).placed(places, 7)), placed)
    w = some(4, 5)
    assert_close(quadratic(h, w), quadratic(dense(h), w))
    assert_close(quadratic(h, w), torch.stack([each @ dense(h) @ each for each in w]))


def test_is_added_to_either_form() -> None:
    h, other = factored(3), factored(5)
    matrix = dense(other)
    both = h + other
    assert isinstance(both, Factored)
    for total in (both, h + matrix, matrix + h, sum([other], start=h), sum([matrix], start=h)):
        assert_close(dense(total), dense(h) + matrix)
    many = factored(D - 3) + h
    assert isinstance(many, Tensor)  # as many rows as columns: no smaller than the matrix
    assert_close(many, dense(h) + (many - dense(h)))


# --- the span -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fictive", [([], []), ([3, 8], []), ([3], [3, 9]), (list(range(2, D)), [0])])
def test_the_span_holds_all_that_is_not_diagonal(fictive: tuple[list[int], list[int]]) -> None:
    hs = [without(factored(n), columns) for n, columns in zip((4, 7), fictive, strict=True)]
    span = span_of(hs)
    assert span is not None
    basis = span.inside(torch.eye(D, dtype=DOUBLE))
    assert_close(basis.mT @ basis, torch.eye(basis.shape[1], dtype=DOUBLE))
    outside = torch.eye(D, dtype=DOUBLE) - basis @ basis.mT
    for h, k, diagonal in zip(hs, span.curvatures, span.diagonals, strict=True):
        assert torch.equal(diagonal, h.diagonal)
        assert_close(basis @ k @ basis.mT + outside * diagonal, dense(h))
        assert_close(diagonal[:, None] * basis, basis * span.inside_diagonal(diagonal))
    w, inside = some(3, D), some(3, basis.shape[1])
    moved = span.with_inside(w, inside)
    assert_close(span.inside(moved), inside)
    assert_close(moved @ outside, w @ outside)
    assert_close(span.with_inside(w, span.inside(w)), w)


def test_no_span_with_a_matrix() -> None:
    assert span_of([factored(3), dense(factored(3))]) is None


# --- difference and update ----------------------------------------------------------------------------------------


def nothing_read() -> Factored:
    return Factored(torch.zeros(3, D, dtype=DOUBLE), torch.zeros(D, dtype=DOUBLE))


CASES = {
    "few rows": lambda: [factored(5), factored(8)],
    "one row": lambda: [factored(1), factored(1)],
    "the same rows": lambda: [factored(4)] * 2,
    "as many rows as columns": lambda: [factored(D), factored(7)],
    "curvatures of different size": lambda: [factored(5), 1e-4 * factored(8)],
    "fictive in one": lambda: [without(factored(5), [1, 7, 30]), factored(8)],
    "fictive in both": lambda: [without(factored(5), [1, 7, 30]), without(factored(8), [7, 40])],
    "one task read nothing": lambda: [nothing_read(), factored(8)],
    "much damping": lambda: [factored(5, damping=1.0), factored(8, damping=1.0)],
    "no damping": lambda: [factored(5, damping=0.0), factored(8, damping=0.0)],
    "no damping, fictive in one": lambda: [without(factored(5, damping=0.0), [1]), factored(8, damping=0.0)],
    "damping in one": lambda: [factored(5, damping=0.0), factored(8)],
}


@pytest.mark.parametrize("case", CASES)
def test_the_difference_is_that_of_matrices(case: str) -> None:
    h = CASES[case]()
    w_a, w_b = some(4, D), some(3, D)
    wanted = functional_difference(w_a, w_b, *map(dense, h))
    rounding = 1e-13 * float(quadratic(h[1], w_b).max())
    for given_ in (functional_difference(w_a, w_b, *h), functional_difference(w_a, w_b, h[0], dense(h[1]))):
        torch.testing.assert_close(given_, wanted, rtol=1e-9, atol=rounding)


@pytest.mark.parametrize("case", CASES)
def test_the_update_is_that_of_matrices(case: str) -> None:
    h, w = CASES[case](), [some(4, D), some(4, D)]
    wanted = merge_weights(w, [dense(each) for each in h])
    assert_close(merge_weights(w, h), wanted)
    assert_close(merge_weights(w, [h[0], dense(h[1])]), wanted)


def test_three_tasks_at_once_or_one_by_one() -> None:
    h, w = [without(factored(5), [2]), factored(3), without(factored(6), [2, 9])], [some(4, D) for _ in range(3)]
    at_once = merge_weights(w, h)
    assert_close(at_once, merge_weights(w, [dense(each) for each in h]))
    assert_close(merge_weights([merge_weights(w[:2], h[:2]), w[2]], [h[0] + h[1], h[2]]), at_once)


@given(st.integers(0, 2**32), st.floats(-14, 0))
def test_the_rise_is_the_difference_however_small_the_damping(seed: int, exponent: float) -> None:
    """What the update costs is what eq. 12 says it does, to the rounding of the tasks' own error."""
    torch.manual_seed(seed)
    h, w = [factored(n, damping=10**exponent) for n in (5, 8)], [some(3, D), some(3, D)]
    merged = merge_weights(w, h)
    rise = sum(0.5 * quadratic(each, merged - own) for each, own in zip(h, w, strict=True))
    rounding = 1e-12 * max(float(quadratic(each, own).max()) for each, own in zip(h, w, strict=True))
    torch.testing.assert_close(functional_difference(*w, *h).diagonal(), rise, rtol=1e-6, atol=rounding)


def test_equal_weights_cost_nothing_and_stay() -> None:
    h, w = [factored(5), factored(8)], some(4, D)
    assert (functional_difference(w, w, *h).diagonal() == 0).all()
    assert torch.equal(merge_weights([w, w], h), w)


# --- what a layer reads -------------------------------------------------------------------------------------------


@pytest.fixture(params=[0.25, 4.0], ids=["few rows", "rows beyond the columns"])
def _rows_are_kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskzip.algebra.curvature._SMALL", 0)
    monkeypatch.setattr("taskzip.algebra.curvature._FEW", request.param)


def both_forms(rows: int = 12, units: int = 4, dtype: torch.dtype = DOUBLE) -> list[LayerStatistics]:
    """The statistics of the same rows, kept and summed up."""
    kept, summed = LayerStatistics(D, units, CPU), LayerStatistics(D, units, CPU)
    summed._sum_up()
    for weight in (1.0, 2.5, 1.0):
        x, z = some(rows // 3, D) + 0.5, some(rows // 3, units) - 3
        for each in (kept, summed):
            each.update(x.to(dtype), z.to(dtype), weight)
    assert isinstance(kept.curvature, Factored)
    assert isinstance(summed.curvature, Tensor)
    return [kept, summed]


@pytest.mark.usefixtures("_rows_are_kept")
def test_the_sums_are_the_same() -> None:
    kept, summed = both_forms()
    for name in ("gram", "cross", "square"):
        assert_close(getattr(kept, name), getattr(summed, name))
    assert kept.rows == pytest.approx(summed.rows)
    assert_close(dense(kept.covariance()), dense(summed.covariance()))


@pytest.mark.usefixtures("_rows_are_kept")
def test_the_moments_are_the_same() -> None:
    kept, summed = both_forms()
    w = some(7, D + 1)
    for given_, wanted in zip(
        (*kept.answer_moments(), *kept.moments(w)), (*summed.answer_moments(), *summed.moments(w)), strict=True
    ):
        assert_close(given_, wanted)


@pytest.mark.usefixtures("_rows_are_kept")
@pytest.mark.parametrize("ridge", [1e-3, 1.0, 0.0])
@pytest.mark.parametrize("bias", [True, False])
def test_least_squares_are_the_same(ridge: float, bias: bool) -> None:
    kept, summed = both_forms()
    now = some(4, D + 1)
    if not bias:
        now[:, -1] = 0
    found = least_squares(kept, now, ridge, bias=bias)
    assert_close(found, least_squares(summed, now, ridge, bias=bias))
    if not bias:
        assert torch.equal(found[:, -1], now[:, -1])


@pytest.mark.usefixtures("_rows_are_kept")
def test_spread_and_batch_norm_are_the_same() -> None:
    forms = both_forms()
    w, units = some(3, D + 1), torch.tensor([3, 0, 1])
    spread = [match_spread([s, s], [w, 0.5 * w], [units, units], [0.3, 0.7]) for s in forms]
    ones, new = torch.ones(4), torch.full((4, D + 1), 0.1, dtype=DOUBLE)
    normed = [batch_norm_statistics(s.answer_moments(), s.moments(new), ones, ones, 1e-5) for s in forms]
    for kept, summed in zip((*spread[0], *normed[0]), (*spread[1], *normed[1]), strict=True):
        assert_close(kept, summed)


@pytest.mark.usefixtures("_rows_are_kept")
def test_weights_that_fit_stay() -> None:
    x, w = some(9, D), some(4, D + 1)
    statistics = LayerStatistics(D, 4, CPU)
    statistics.update(x, x @ w[:, :-1].mT + w[:, -1])
    assert_close(least_squares(statistics, w, 1e-3, bias=True), w)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.usefixtures("_rows_are_kept")
def test_values_that_are_not_finite_are_noticed(value: float, where: int) -> None:
    given_ = some(6, D), some(6, 4)
    statistics = LayerStatistics(D, 4, CPU)
    statistics.update(*given_)
    assert statistics.is_finite()
    given_[where][3, 1] = value
    statistics.update(*given_)
    assert not statistics.is_finite()


def test_rows_are_summed_up_where_they_are_many_or_columns_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taskzip.algebra.curvature._SMALL", D)
    statistics = LayerStatistics(D, 4, CPU)
    for read, form in ((D // 4, Factored), (1, Tensor), (1, Tensor)):
        statistics.update(some(read, D), some(read, 4))
        assert isinstance(statistics.curvature, form)
    assert statistics.rows == D // 4 + 2
    small = LayerStatistics(D - 1, 4, CPU)
    small.update(some(1, D - 1), some(1, 4))
    assert isinstance(small.curvature, Tensor)


def test_sums_do_not_depend_on_whether_rows_were_kept_before(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [(torch.randn(9, D), torch.randn(9, 4), weight) for weight in (1.0, 2.0, 1.5)]
    forms = []
    for small in (D, D + 1):
        monkeypatch.setattr("taskzip.algebra.curvature._SMALL", small)
        forms.append(LayerStatistics(D, 4, CPU))
        for batch in batches:
            forms[-1].update(*batch)
    for name in ("gram", "cross", "square"):
        assert torch.equal(*(getattr(each, name) for each in forms))


# --- all together -------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Layers of far more inputs than there are samples: linear ones, and a convolution behind batch-norm."""

    def __init__(self, inputs: int = 200) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, 160)
        self.conv = nn.Conv1d(80, 70, 2)
        self.norm = nn.BatchNorm1d(70)
        self.middle = nn.Linear(70, 200, bias=False)
        self.last = nn.Linear(200, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu().reshape(-1, 80, 2)
        return self.last(self.middle(self.norm(self.conv(x)).relu().flatten(1)).relu())


def tasks(inputs: tuple[int, ...] = (200, 200), samples: int = 15) -> list[tz.Task]:
    networks = [Wide(each).double().eval() for each in inputs]
    return [
        tz.Task(name, network, list(some(samples, each).split(6)))
        for name, network, each in zip("abc", networks, inputs, strict=False)
    ]


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ((200, 200), {}),
        ((200, 200), {"share": 0.6}),
        ((200, 170), {"share": 0.8}),
        ((200, 200), {"damping": 0.0, "matching": "greedy"}),
        ((200, 200), {"compensate": False}),
        ((190, 200, 170), {"share": 0.8}),
    ],
    ids=["full", "partial", "fictive inputs", "no damping", "no compensation", "three tasks"],
)
def test_zipping_gives_the_same_network(
    inputs: tuple[int, ...], options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    given_ = tasks(inputs)
    found = []
    for small in (10_000, 0):
        monkeypatch.setattr("taskzip.algebra.curvature._SMALL", small)
        found.append(tz.zip(given_, **({"share": 1.0} | options), progress=False))  # type: ignore[arg-type]
    wanted, zipped = found
    for record, other in zip(zipped.history.layers, wanted.history.layers, strict=True):
        assert record.shared == other.shared
        assert record.cost == pytest.approx(other.cost, rel=1e-6)
    for name, tensor in zipped.state_dict().items():
        torch.testing.assert_close(tensor, wanted.state_dict()[name], rtol=1e-6, atol=1e-6)
    for task in given_:
        batch = next(task.batches())
        torch.testing.assert_close(zipped[task.name](batch), wanted[task.name](batch), rtol=1e-6, atol=1e-6)


# --- pruned networks ----------------------------------------------------------------------------------------------


def pruned(w: Tensor, rows: list[int]) -> Tensor:
    """Some rows with most of their connections missing, one of them with none left but the bias."""
    for row in rows:
        w[row, torch.randperm(w.shape[1] - 1)[: D // 2]] = 0
    w[rows[0], :-1] = 0
    return w


@pytest.mark.parametrize("case", CASES)
def test_the_update_of_pruned_units_is_that_of_matrices(case: str) -> None:
    h, w = CASES[case](), [some(5, D), some(5, D)]
    exists = pruned(some(5, D), [1, 3]) != 0
    wanted = merge_weights(w, [dense(each) for each in h], exists)
    for found in (merge_weights(w, h, exists), merge_weights(w, [h[0], dense(h[1])], exists)):
        assert_close(found, wanted)
        assert (found[~exists] == 0).all()


@pytest.mark.usefixtures("_rows_are_kept")
@pytest.mark.parametrize("ridge", [1e-3, 1.0, 0.0])
@pytest.mark.parametrize("bias", [True, False])
def test_least_squares_of_pruned_units_are_the_same(ridge: float, bias: bool) -> None:
    kept, summed = both_forms()
    now = pruned(some(4, D + 1), [0, 2])
    if not bias:
        now[:, -1] = 0
    found = least_squares(kept, now, ridge, bias=bias)
    assert_close(found, least_squares(summed, now, ridge, bias=bias))
    assert (found[now == 0] == 0).all()


def test_a_few_zeros_by_chance_need_no_large_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the 100 M weights that torch draws for VGG-16's first linear layer about six are exactly 0."""
    monkeypatch.setattr("taskzip.algebra.curvature._SMALL", 0)
    form, given_ = Factored.dense, tasks()
    for task in given_:
        with torch.no_grad():
            task.model.get_parameter("first.weight")[3, 5] = 0
            task.model.get_parameter("conv.weight")[:2, 7] = 0

    def small(h: Factored) -> Tensor:
        assert len(h) < 100
        return form(h)

    monkeypatch.setattr(Factored, "dense", small)
    zipped = tz.zip(given_, share=1.0, progress=False)
    assert zipped.history.layers[0].shared == 160
