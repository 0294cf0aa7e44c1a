"""Ranks that fit, and hardly any that are better."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from taskzip.planning.ranks import Ranked, choose_ranks


def layer(rng: np.random.Generator, units: int, inputs: int) -> Ranked:
    values = np.sort(rng.exponential(size=min(units, inputs)) ** 3)[::-1]
    errors = np.append(values[::-1].cumsum()[::-1], 0)
    return Ranked(errors, units + inputs, units * inputs)


def size(layers: list[Ranked], ranks: list[int | None]) -> int:
    return sum(x.whole if rank is None else rank * x.each for x, rank in zip(layers, ranks, strict=True))


def error(layers: list[Ranked], ranks: list[int | None]) -> float:
    return sum(0.0 if rank is None else float(x.errors[rank]) for x, rank in zip(layers, ranks, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_against_all_choices(seed: int) -> None:
    """On the hull nothing is better; between two of its points at most one step of one layer is lost."""
    rng = np.random.default_rng(seed)
    layers = [layer(rng, *rng.integers(3, 9, 2)) for _ in range(3)]
    choices = list(itertools.product(*([*range(1, x.most + 1), None] for x in layers)))
    whole, least = sum(x.whole for x in layers), sum(x.least for x in layers)
    for parameters in range(least, whole + 1, 7):
        ranks = choose_ranks(layers, parameters)
        assert size(layers, ranks) <= parameters
        assert all(rank is None or 1 <= rank <= x.most for x, rank in zip(layers, ranks, strict=True))
        best = min(error(layers, list(each)) for each in choices if size(layers, list(each)) <= parameters)
        smaller = min(
            error(layers, list(each)) for each in choices if size(layers, list(each)) <= max(least, parameters - 50)
        )
        assert best <= error(layers, ranks) + 1e-12
        assert error(layers, ranks) <= smaller + 1e-12
    assert choose_ranks(layers, whole) == [None] * 3
    assert size(layers, choose_ranks(layers, least)) == least


def test_what_matters_more_gets_more() -> None:
    errors = np.array([4.0, 3.0, 2.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    alike = [Ranked(errors, 20, 100), Ranked(100 * errors, 20, 100)]
    few, many = choose_ranks(alike, 120)
    assert few == 1 and many is None


def test_a_layer_that_no_rank_makes_smaller_stays_whole() -> None:
    assert choose_ranks([Ranked(np.array([1.0, 0.0]), 11, 10), Ranked(np.array([2.0, 1.0, 0.0]), 6, 9)], 16) == [
        None,
        1,
    ]
