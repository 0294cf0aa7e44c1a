from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from taskzip.algebra.curvature import LayerStatistics, damped, solve_symmetric

CPU = torch.device("cpu")


def filled(rows: Tensor, answers: Tensor, weight: float = 1.0) -> LayerStatistics:
    statistics = LayerStatistics(rows.shape[1], answers.shape[1], CPU)
    statistics.update(rows, answers, weight)
    return statistics


def some(rows: int = 30, d: int = 4, units: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, d, dtype=torch.float64) + 0.5, torch.randn(rows, units, dtype=torch.float64) - 1


def test_sums_row_by_row() -> None:
    x, z = some()
    s = filled(x, z)
    gram, cross, square = np.zeros((5, 5)), np.zeros((5, 3)), np.zeros(3)
    for row, answer in zip(x.numpy(), z.numpy(), strict=True):
        one = np.append(row, 1.0)
        gram += np.outer(one, one)
        cross += np.outer(one, answer)
        square += answer**2
    np.testing.assert_allclose(s.gram.numpy(), gram)
    np.testing.assert_allclose(s.cross.numpy(), cross)
    np.testing.assert_allclose(s.square.numpy(), square)
    assert s.rows == 30


def test_batches_add_up() -> None:
    x, z = some()
    whole, parts = filled(x, z), LayerStatistics(4, 3, CPU)
    for rows, answers in zip(x.split(7), z.split(7), strict=True):
        parts.update(rows, answers)
    for name in ("gram", "cross", "square"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_a_row_may_stand_for_several() -> None:
    x, z = some()
    heavy, three = filled(x, z, 3.0), filled(x.repeat(3, 1), z.repeat(3, 1))
    for name in ("gram", "cross", "square"):
        torch.testing.assert_close(getattr(heavy, name), getattr(three, name))
    assert heavy.rows == 90


def test_float32_rows_are_summed_in_float64() -> None:
    x, z = some(4000)
    s, wanted = filled(x.float(), z.float()), filled(x, z)
    assert s.gram.dtype == s.cross.dtype == s.square.dtype == torch.float64
    torch.testing.assert_close(s.gram, wanted.gram, rtol=1e-4, atol=1e-2)
    one_by_one = LayerStatistics(4, 3, CPU)
    for rows, answers in zip(x.float().split(1), z.float().split(1), strict=True):
        one_by_one.update(rows, answers)
    torch.testing.assert_close(one_by_one.gram, wanted.gram, rtol=1e-6, atol=1e-3)


def test_moments_of_the_answers() -> None:
    x, z = some()
    mean, variance = filled(x, z).answer_moments()
    torch.testing.assert_close(mean, z.mean(0))
    torch.testing.assert_close(variance, z.var(0, unbiased=False))


def test_moments_of_what_other_weights_answer() -> None:
    x, z = some()
    w = torch.randn(3, 5, dtype=torch.float64)
    y = x @ w[:, :-1].mT + w[:, -1]
    mean, variance = filled(x, z, 2.0).moments(w)
    torch.testing.assert_close(mean, y.mean(0))
    torch.testing.assert_close(variance, y.var(0, unbiased=False))


def test_moments_of_a_constant_are_never_negative() -> None:
    s = filled(torch.full((7, 2), 0.1), torch.full((7, 1), 1e4 / 3))
    assert (s.answer_moments()[1] >= 0).all()
    assert (s.moments(torch.tensor([[1e3, -7.0, 0.3]], dtype=torch.float64))[1] >= 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["rows", "answers"])
def test_values_that_are_not_finite_are_noticed(value: float, where: str) -> None:
    x, z = some()
    assert filled(x, z).is_finite()
    (x if where == "rows" else z)[3, 1] = value
    assert not filled(x, z).is_finite()


def test_damping_is_relative_to_the_mean_of_the_diagonal() -> None:
    h = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    torch.testing.assert_close(damped(h, 0.1), torch.tensor([[4.3, 1.0], [1.0, 2.3]]))
    torch.testing.assert_close(damped(5 * h, 0.1), 5 * damped(h, 0.1))
    assert torch.equal(damped(h, 0.0), h)
    assert torch.equal(h, torch.tensor([[4.0, 1.0], [1.0, 2.0]]))


@pytest.mark.parametrize("rows", [3, 400])
def test_held_out_rows_are_summed_up_with_the_others_and_by_themselves(rows: int) -> None:
    """Few rows are kept as they are, many are summed up."""
    x, z = torch.randn(rows, 30, dtype=torch.float64), torch.randn(rows, 4, dtype=torch.float64) + 5
    whole, fit = LayerStatistics(30, 4, torch.device("cpu")), LayerStatistics(30, 4, torch.device("cpu"))
    whole.update(x, z)
    held = fit.held_out_beside(z)
    fit.update(x[1:], z[1:])
    held.update(x[:1], z[:1])
    total = fit.with_held_out(held)
    for name in ("gram", "cross", "square", "rows"):
        torch.testing.assert_close(getattr(total, name), getattr(whole, name))
    assert total.parts == (fit, held)
    torch.testing.assert_close(held.cross, torch.outer(torch.cat([x[0], torch.ones(1).double()]), z[0]))
    some = torch.tensor([2, 0])
    torch.testing.assert_close(total.of_units(some).cross, whole.cross[:, some])
    torch.testing.assert_close(total.of_units(some).square, whole.square[some])


@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(0, 8))
def test_solves_by_the_pseudo_inverse(seed: int, d: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(min(rank, d), d))
    h, right = x.T @ x, rng.normal(size=(d, 3))
    given_ = solve_symmetric(torch.from_numpy(h), torch.from_numpy(right)).numpy()
    wanted = np.linalg.pinv(h, rcond=1e-12, hermitian=True) @ right
    np.testing.assert_allclose(given_, wanted, rtol=1e-5, atol=1e-7 * max(1.0, np.abs(wanted).max()))


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8, 1e12])
def test_solves_ill_conditioned_systems(condition: float) -> None:
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    h = q @ torch.diag(torch.logspace(0, -np.log10(condition), 6, dtype=torch.float64)) @ q.mT
    h = (h + h.mT) / 2
    x = torch.randn(6, 2, dtype=torch.float64)
    right = h @ x
    torch.testing.assert_close(h @ solve_symmetric(h, right), right, rtol=0, atol=1e-12 * float(x.abs().max()))


def test_the_scale_of_the_curvature_does_not_matter() -> None:
    """Inputs of any unit: what counts as singular is relative."""
    x = torch.randn(3, 5, dtype=torch.float64)
    for h in (x.mT @ x, torch.eye(5, dtype=torch.float64)):
        right = h @ torch.randn(5, 2, dtype=torch.float64)
        for scale in (1e-20, 1e20):
            torch.testing.assert_close(solve_symmetric(scale * h, right) * scale, solve_symmetric(h, right))


def test_float32_systems() -> None:
    x = torch.randn(20, 5)
    h, right = x.mT @ x, torch.randn(5, 2)
    torch.testing.assert_close(h @ solve_symmetric(h, right), right, rtol=1e-4, atol=1e-4)
