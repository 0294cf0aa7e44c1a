"""The ridge that held-out rows choose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taskzip.algebra.curvature import LayerStatistics
from taskzip.algebra.recalibration import least_squares
from taskzip.algebra.ridge import DEFAULT, RIDGES, choose_ridge


def split(x: Tensor, z: Tensor) -> LayerStatistics:
    """Every fourth row held out."""
    fit = LayerStatistics(x.shape[1], z.shape[1], x.device)
    held, out = fit.held_out_beside(z), torch.arange(len(x)) % 4 == 0
    fit.update(x[~out], z[~out])
    held.update(x[out], z[out])
    return fit.with_held_out(held)


def answers(x: Tensor, w: Tensor) -> Tensor:
    return x @ w[:, :-1].mT + w[:, -1]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_present_weights_that_are_right_are_held_on_to() -> None:
    x, w = torch.randn(30, 20).double(), torch.randn(4, 21).double()
    noise = torch.randn(30, 4).double()
    assert choose_ridge(split(x, answers(x, w) + noise), w, bias=True) == RIDGES[0]


def test_present_weights_for_other_inputs_are_let_go() -> None:
    """A plain refit is what serves: rows are many, and the answers have no noise."""
    x, w = torch.randn(4000, 20).double(), torch.randn(4, 21).double()
    statistics = split(x, answers(x, w))
    ridge = choose_ridge(statistics, -30 * w, bias=True)
    assert ridge == RIDGES[-1]
    torch.testing.assert_close(least_squares(statistics, -30 * w, ridge, bias=True), w, rtol=1e-2, atol=1e-2)


def test_the_scale_of_inputs_and_answers_does_not_matter() -> None:
    x, w = torch.randn(200, 20).double(), torch.randn(4, 21).double()
    z, present = answers(x, w) + torch.randn(200, 4).double(), w + torch.randn(4, 21).double() / 2
    scale = torch.exp(torch.randn(20)).double()
    scaled = torch.cat([1 / scale, torch.ones(1).double()])
    ridges = {
        choose_ridge(split(x, z), present, bias=True),
        choose_ridge(split(x * scale, z), present * scaled, bias=True),
        choose_ridge(split(x, 7 * z), 7 * present, bias=True),
    }
    assert len(ridges) == 1


def test_without_held_out_rows_there_is_a_default() -> None:
    statistics = LayerStatistics(3, 2, torch.device("cpu"))
    statistics.update(torch.randn(5, 3), torch.randn(5, 2))
    assert choose_ridge(statistics, torch.randn(2, 4).double(), bias=True) == DEFAULT
