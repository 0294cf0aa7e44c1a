"""Low rank in two metrics against a singular value decomposition of all rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taskzip.algebra.curvature import LayerStatistics
from taskzip.algebra.low_rank import low_rank, spectrum

DOUBLE = torch.float64


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def metric_of(units: int) -> Tensor:
    root = some(units, units + 3)
    return root @ root.mT


def summed(x: Tensor) -> LayerStatistics:
    statistics = LayerStatistics(x.shape[1], 0, x.device)
    statistics.update(x, x[:, :0])
    return statistics


def error(x: Tensor, weights: Tensor, others: Tensor, metric: Tensor) -> float:
    """Row by row: mean of dz^T G dz."""
    ones = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    dz = ones @ (weights - others).mT
    return sum(float(row @ metric @ row) for row in dz) / len(dz)


def best(x: Tensor, weights: Tensor, metric: Tensor, *, bias: bool) -> Tensor:
    """What rank 0, 1, ... leaves, by Eckart and Young over all rows."""
    z = x @ weights[:, :-1].mT
    z = z - z.mean(0) if bias else z
    values = torch.linalg.svdvals(z @ torch.linalg.cholesky(metric)).square() / len(x)
    return torch.stack([values[rank:].sum() for rank in range(len(values))])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows, inputs", [(200, 9), (200, 4), (40, 1500)])  # the last one is kept factored
def test_no_weights_of_the_rank_are_better(rows: int, inputs: int, bias: bool) -> None:
    units = 6
    x, weights, metric = some(rows, inputs) @ some(inputs, inputs) + 0.7, some(units, inputs + 1), metric_of(units)
    weights[:, -1] *= bias
    statistics, wanted = summed(x), best(x, weights, metric, bias=bias)
    values = spectrum(statistics, weights, metric, bias=bias)
    for rank in range(1, min(units, inputs)):
        found = low_rank(statistics, weights, metric, rank, bias=bias)
        assert found.left.shape == (units, rank) and found.right.shape == (rank, inputs)
        assert error(x, weights, found.weights(), metric) == pytest.approx(float(wanted[rank]), rel=1e-6, abs=1e-9)
        assert float(values[rank:].sum()) == pytest.approx(float(wanted[rank]), rel=1e-6, abs=1e-9)


def test_with_a_bias_the_means_stay() -> None:
    x, weights = some(50, 5) + 3, some(4, 6)
    found = low_rank(summed(x), weights, metric_of(4), 2, bias=True).weights()
    means = [(x @ w[:, :-1].mT + w[:, -1]).mean(0) for w in (weights, found)]
    torch.testing.assert_close(*means)


def test_without_one_there_is_none() -> None:
    weights = some(4, 6)
    weights[:, -1] = 0
    assert not low_rank(summed(some(50, 5)), weights, metric_of(4), 2, bias=False).bias.any()


def test_weights_of_low_rank_are_found_again() -> None:
    x, left, right = some(60, 8), some(7, 3), some(3, 8)
    weights = torch.cat([left @ right, some(7, 1)], dim=1)
    found = low_rank(summed(x), weights, metric_of(7), 3, bias=True)
    torch.testing.assert_close(found.weights(), weights, rtol=1e-8, atol=1e-8)


def test_dead_inputs_and_directions_that_do_not_matter() -> None:
    """Singular curvature and metric: normal."""
    x, weights, root = some(60, 8), some(5, 9), some(5, 2)
    x[:, ::2] = 0
    found = low_rank(summed(x), weights, root @ root.mT, 2, bias=True).weights()
    assert found.isfinite().all()
    assert error(x, weights, found, root @ root.mT) < 0.01 * error(x, weights, 0 * found, root @ root.mT)
