"""Weights over some of the inputs, against plain least squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taskzip.algebra.factored import Factored
from taskzip.algebra.projection import project, rise


def problem(rows: int, damping: float) -> tuple[Tensor, Tensor, Factored]:
    x, w = torch.randn(rows, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    return x, w, Factored(x, torch.full((9,), damping, dtype=torch.float64))


@pytest.mark.parametrize("rows", [5, 30])
@pytest.mark.parametrize("kept", [1, 6, 9])
@pytest.mark.parametrize("factored", [False, True])
def test_the_closest_answers_that_some_inputs_can_give(rows: int, kept: int, factored: bool) -> None:
    x, w, few = problem(rows, 0.1)
    h = few if factored else few.dense()
    pull = 0.1**0.5 * torch.eye(kept, dtype=torch.float64)
    left, right = torch.cat([x[:, :kept], pull]), torch.cat([x @ w.T, pull @ w[:, :kept].T])
    wanted = torch.linalg.lstsq(left, right).solution.T
    found = project(h, w, kept)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    apart = (x[:, :kept] @ found.T - x @ w.T).square().sum(0) / 2
    prior = torch.cat([found - w[:, :kept], w[:, kept:]], 1).square().sum(1) * 0.1 / 2
    torch.testing.assert_close(rise(h, w, found), apart + prior)
    for _ in range(5):
        other = found + 0.1 * torch.randn_like(found)
        assert (rise(h, w, other) >= rise(h, w, found)).all()


@pytest.mark.parametrize("factored", [False, True])
def test_where_nothing_is_lost_nothing_changes(factored: bool) -> None:
    _, w, few = problem(5, 0.0)
    h = few if factored else few.dense()
    assert torch.equal(project(h, w, 9), w)
    w[:, 6:] = 0
    torch.testing.assert_close(project(h, w, 6), w[:, :6], rtol=1e-12, atol=1e-12)
    assert rise(h, w, w[:, :6]).max() == 0
