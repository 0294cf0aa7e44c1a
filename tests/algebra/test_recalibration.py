from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from taskzip.algebra.curvature import LayerStatistics
from taskzip.algebra.recalibration import Moments, batch_norm_statistics, least_squares, match_spread

DOUBLE = torch.float64


def filled(x: Tensor, z: Tensor) -> LayerStatistics:
    statistics = LayerStatistics(x.shape[1], z.shape[1], torch.device("cpu"))
    statistics.update(x, z)
    return statistics


def moments(statistics: LayerStatistics, weights: Tensor) -> tuple[Moments, Moments]:
    return statistics.answer_moments(), statistics.moments(weights)


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def answers(x: Tensor, w: Tensor) -> Tensor:
    return x @ w[:, :-1].mT + w[:, -1]


# --- least squares ------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(1, 20), st.sampled_from([1e-4, 1e-2, 1.0]), st.booleans())
def test_is_the_least_of_what_it_minimises(seed: int, rows: int, ridge: float, bias: bool) -> None:
    """Against one least-squares problem in which the ridge is more rows."""
    torch.manual_seed(seed)
    x, z, now = some(rows, 4) + 0.5, some(rows, 3), some(3, 5)
    if not bias:
        now[:, -1] = 0
    found = least_squares(filled(x, z), now, ridge, bias=bias)
    inputs = torch.cat([x, torch.ones(rows, 1, dtype=DOUBLE)], dim=1).numpy()[:, : 5 if bias else 4]
    d = inputs.shape[1]
    squares = (inputs**2).sum(0)
    pull = np.sqrt(ridge * np.maximum(squares, 1e-2 * squares.mean()))
    stacked = np.vstack([inputs, np.diag(pull)])
    wanted = np.vstack([z.numpy(), pull[:, None] * now.numpy()[:, :d].T])
    solution = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    np.testing.assert_allclose(found.numpy()[:, :d], solution, rtol=1e-6, atol=1e-8)
    assert torch.equal(found[:, d:], now[:, d:])


def test_finds_the_weights_that_made_the_answers() -> None:
    x, w = some(40, 5), some(3, 6)
    torch.testing.assert_close(least_squares(filled(x, answers(x, w)), some(3, 6), 0.0, bias=True), w)


def test_leaves_weights_that_fit() -> None:
    x, w = some(6, 9), some(3, 10)  # fewer rows than inputs
    torch.testing.assert_close(least_squares(filled(x, answers(x, w)), w, 1e-3, bias=True), w)


def test_a_strong_ridge_keeps_the_present_weights() -> None:
    x, w = some(40, 5), some(3, 6)
    torch.testing.assert_close(least_squares(filled(x, some(40, 3)), w, 1e9, bias=True), w, rtol=1e-6, atol=1e-6)


def test_a_dead_input_keeps_its_weights() -> None:
    x, w = some(40, 5), some(3, 6)
    x[:, 2] = 0
    found = least_squares(filled(x, some(40, 3)), w, 1e-2, bias=True)
    torch.testing.assert_close(found[:, 2], w[:, 2])


# --- spread -------------------------------------------------------------------------------------------------------


def balanced(alphas: Sequence[float], values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance per unit, averaged over the tasks."""
    mean = sum(a * v.mean(0) for a, v in zip(alphas, values, strict=True))
    variance = sum(a * v.var(0, unbiased=False) for a, v in zip(alphas, values, strict=True))
    return mean, variance


@pytest.mark.parametrize("alphas", [(0.5, 0.5), (0.2, 0.8), (1.0,)])
def test_mean_and_variance_are_the_original_ones_again(alphas: Sequence[float]) -> None:
    tasks = len(alphas)
    x = [some(50 + 9 * t, 6) + 1 for t in range(tasks)]
    z = [2 * some(len(each), 8) - 2 for each in x]
    units = [torch.randperm(8)[:4] for _ in range(tasks)]
    w = [some(4, 7) for _ in range(tasks)]
    scale, shift = match_spread([filled(a, b) for a, b in zip(x, z, strict=True)], w, units, alphas)
    assert (scale > 0).all()
    y = [scale * answers(a, b) + shift for a, b in zip(x, w, strict=True)]
    wanted_mean, wanted_variance = balanced(alphas, [b[:, u] for b, u in zip(z, units, strict=True)])
    mean, variance = balanced(alphas, y)
    torch.testing.assert_close(mean, wanted_mean)
    torch.testing.assert_close(variance, wanted_variance)


@pytest.mark.parametrize("factor, wanted", [(1e3, 0.5), (1e-3, 2.0)])
def test_what_is_all_but_constant_is_not_blown_up(factor: float, wanted: float) -> None:
    x, w = some(50, 6), some(4, 7)
    scale, shift = match_spread([filled(x, answers(x, w))], [factor * w], [torch.arange(4)], (1.0,))
    torch.testing.assert_close(scale, torch.full_like(scale, wanted))
    torch.testing.assert_close((scale * answers(x, factor * w) + shift).mean(0), answers(x, w).mean(0))


def test_the_tasks_may_have_different_inputs() -> None:
    x, z = [some(30, 4), some(20, 7)], [some(30, 3), some(20, 3)]
    statistics = [filled(a, b) for a, b in zip(x, z, strict=True)]
    scale, shift = match_spread(statistics, [some(3, 5), some(3, 8)], [torch.arange(3)] * 2, (0.5, 0.5))
    assert scale.shape == shift.shape == (3,)


def test_original_weights_are_not_scaled() -> None:
    x, w = some(50, 6), some(8, 7)
    scale, shift = match_spread([filled(x, answers(x, w))], [w[[3, 1]]], [torch.tensor([3, 1])], [1.0])
    torch.testing.assert_close(scale, torch.ones(2, dtype=DOUBLE))
    torch.testing.assert_close(shift, torch.zeros(2, dtype=DOUBLE))


def test_a_unit_without_spread_is_only_shifted() -> None:
    x, w = some(50, 6), some(2, 7)
    w[0, :-1] = 0  # answers its bias
    z = some(50, 2) + 5
    scale, shift = match_spread([filled(x, z)], [w], [torch.arange(2)], [1.0])
    assert scale[0] == 1
    torch.testing.assert_close(w[0, -1] + shift[0], z[:, 0].mean())
    assert torch.isfinite(scale).all()


def test_a_unit_that_never_was_alive_stays_finite() -> None:
    x = torch.zeros(9, 3, dtype=DOUBLE)
    scale, shift = match_spread(
        [filled(x, torch.zeros(9, 2, dtype=DOUBLE))], [torch.zeros(2, 4, dtype=DOUBLE)], [torch.arange(2)], [1.0]
    )
    assert scale.tolist() == [1, 1]
    assert shift.tolist() == [0, 0]


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4, 0.0])
def test_rounding_is_not_taken_for_spread(spread: float) -> None:
    """Float32 rows of a unit whose mean is far above its spread: the original weights are not scaled by noise."""
    x, w = some(500, 6), some(1, 7)
    w[:, :-1] *= spread / w[:, :-1].norm()
    w[:, -1] = 10.0
    x, w = x.float(), w.float()
    scale, _ = match_spread([filled(x, answers(x, w))], [w.double()], [torch.arange(1)], [1.0])
    assert scale.item() == pytest.approx(1, abs=0.02)


# --- batch-norm ---------------------------------------------------------------------------------------------------


def normed(z: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    return (z - mean) / (variance + eps).sqrt()


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_batch_norm_answers_with_the_same_mean_and_spread(eps: float) -> None:
    x, old, new = some(60, 5) + 1, some(4, 6), 3 * some(4, 6)
    z = answers(x, old)
    mean, variance = z.mean(0) + 0.3, z.var(0) * 1.7  # fitted to other data than these
    m, v = batch_norm_statistics(*moments(filled(x, z), new), mean, variance, eps)
    before, after = normed(z, mean, variance, eps), normed(answers(x, new), m, v, eps)
    torch.testing.assert_close(after.mean(0), before.mean(0))
    torch.testing.assert_close(after.var(0), before.var(0))


def test_batch_norm_stays_as_it_was_for_the_original_weights() -> None:
    x, w, mean, variance = some(60, 5), some(4, 6), some(4), some(4).square()
    m, v = batch_norm_statistics(*moments(filled(x, answers(x, w)), w), mean, variance, 1e-5)
    torch.testing.assert_close(m, mean)
    torch.testing.assert_close(v, variance)


def test_batch_norm_of_a_dead_unit_stays_finite() -> None:
    x, w = some(60, 5), some(3, 6)
    old = w.clone()
    old[0] = 0
    m, v = batch_norm_statistics(*moments(filled(x, answers(x, old)), w), torch.zeros(3), torch.zeros(3), 1e-5)
    assert torch.isfinite(m).all() and torch.isfinite(v).all()
    assert (v >= 0).all()
