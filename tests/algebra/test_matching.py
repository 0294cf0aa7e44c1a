from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from taskzip.algebra.matching import Pairs, match

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 5))
# Small whole numbers give many ties; the others give none.
VALUES = st.integers(0, 4).map(float) | st.floats(1e-3, 1e6)
MATRICES = SHAPES.flatmap(lambda shape: arrays(np.float64, shape, elements=VALUES))


def matchings(rows: int, columns: int, size: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All ways to choose `size` pairs."""
    return [
        (a, b) for a in itertools.combinations(range(rows), size) for b in itertools.permutations(range(columns), size)
    ]


def cheapest(d: np.ndarray, size: int) -> float:
    return min(sum(d[i, j] for i, j in zip(a, b, strict=True)) for a, b in matchings(*d.shape, size))


def rounding(d: np.ndarray) -> float:
    """How exactly a solver can know a sum: relative to the largest d."""
    return 1e-13 * float(d.max())


def literally_greedy(d: np.ndarray, count: int) -> list[tuple[int, int]]:
    """Algorithm 1: again and again the smallest d among units that are still free; equal ones in order."""
    pairs: list[tuple[int, int]] = []
    for _ in range(count):
        free_a = set(range(d.shape[0])) - {i for i, _ in pairs}
        free_b = set(range(d.shape[1])) - {j for _, j in pairs}
        pairs.append(min(itertools.product(sorted(free_a), sorted(free_b)), key=lambda pair: (d[pair], *pair)))
    return sorted(pairs)


def assert_is_matching(pairs: Pairs, d: np.ndarray) -> None:
    a, b = pairs.a.tolist(), pairs.b.tolist()
    assert a == sorted(set(a))
    assert len(b) == len(set(b)) == len(a)
    assert pairs.cost.tolist() == [d[i, j] for i, j in zip(a, b, strict=True)]
    assert pairs.a.dtype == pairs.b.dtype == torch.int64
    assert pairs.cost.dtype == torch.float64


@given(MATRICES, st.data())
def test_optimal_is_what_brute_force_finds(d: np.ndarray, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, min(d.shape)))
    pairs = match(torch.from_numpy(d), count=count)
    assert_is_matching(pairs, d)
    assert len(pairs.a) == count
    assert pairs.cost.sum().item() == pytest.approx(cheapest(d, count), rel=1e-12, abs=rounding(d))


@given(MATRICES, st.data())
def test_greedy_is_the_literal_loop(d: np.ndarray, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, min(d.shape)))
    pairs = match(torch.from_numpy(d), count=count, method="greedy")
    assert_is_matching(pairs, d)
    assert list(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True)) == literally_greedy(d, count)


@pytest.mark.parametrize("shape", [(70, 90), (120, 3), (2, 150)])
def test_greedy_is_the_literal_loop_where_it_takes_several_chunks(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    d = rng.integers(0, 40, shape).astype(float) + 100 * (np.arange(shape[1]) > 1)  # all want the same partners
    pairs = match(torch.from_numpy(d), method="greedy")
    assert list(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True)) == literally_greedy(d, min(shape))


@given(MATRICES, st.data())
def test_optimal_costs_at_most_greedy_and_random(d: np.ndarray, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, min(d.shape)))
    costs = {m: match(torch.from_numpy(d), count=count, method=m).cost.sum() for m in ("optimal", "greedy", "random")}
    assert costs["optimal"] <= costs["greedy"] + rounding(d)
    assert costs["optimal"] <= costs["random"] + rounding(d)


@given(MATRICES)
def test_the_cheapest_pairs_cost_more_the_more_there_are(d: np.ndarray) -> None:
    costs = [match(torch.from_numpy(d), count=count).cost.sum().item() for count in range(min(d.shape) + 1)]
    assert all(after >= before - rounding(d) for before, after in itertools.pairwise(costs))


@given(MATRICES)
def test_swapping_the_tasks_swaps_the_pairs(d: np.ndarray) -> None:
    for count in range(min(d.shape) + 1):
        one, other = (match(torch.from_numpy(m.copy()), count=count) for m in (d, d.T))
        assert one.cost.sum().item() == pytest.approx(other.cost.sum().item(), rel=1e-12, abs=rounding(d))


@given(MATRICES, st.integers(0, 4).map(float))
def test_greedy_with_a_threshold_stops_there(d: np.ndarray, threshold: float) -> None:
    pairs = match(torch.from_numpy(d), threshold=threshold, method="greedy")
    wanted = [pair for pair in literally_greedy(d, min(d.shape)) if d[pair] <= threshold]
    assert list(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True)) == wanted


@given(MATRICES, st.floats(0, 5), st.data())
def test_optimal_with_a_threshold_gains_most(d: np.ndarray, threshold: float, data: st.DataObject) -> None:
    """The sum of d - threshold is the least that any number of pairs, up to `count`, can have."""
    count = data.draw(st.integers(0, min(d.shape)))
    pairs = match(torch.from_numpy(d), count=count, threshold=threshold)
    assert_is_matching(pairs, d)
    assert len(pairs.a) <= count
    assert (pairs.cost <= threshold).all()
    least = min(cheapest(d - threshold, size) for size in range(count + 1))
    assert (pairs.cost - threshold).sum().item() == pytest.approx(least, rel=1e-9, abs=1e-7)


@pytest.mark.parametrize("method", ["optimal", "greedy"])
def test_a_pair_exactly_at_the_threshold_is_shared(method: Any) -> None:
    d = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    pairs = match(d, threshold=0.0, method=method)
    assert pairs.a.tolist() == [0, 1, 2]
    assert pairs.b.tolist() == [1, 0, 2]
    assert match(d + 0.5, threshold=0.5, method=method).b.tolist() == [1, 0, 2]


@given(MATRICES, st.integers(0, 4).map(float))
def test_a_threshold_leaves_no_pair_below_it_apart(d: np.ndarray, threshold: float) -> None:
    for method in ("optimal", "greedy"):
        pairs = match(torch.from_numpy(d), threshold=threshold, method=method)
        free_a = set(range(d.shape[0])) - set(pairs.a.tolist())
        free_b = set(range(d.shape[1])) - set(pairs.b.tolist())
        assert not any(d[i, j] <= threshold for i in free_a for j in free_b)


def test_optimal_is_not_greedy() -> None:
    d = torch.tensor([[0.0, 1.0], [1.0, 10.0]])
    assert match(d, method="greedy").cost.tolist() == [0.0, 10.0]
    assert match(d).cost.tolist() == [1.0, 1.0]


def test_all_pairs_unless_told_otherwise() -> None:
    assert len(match(torch.rand(4, 7)).a) == 4
    assert len(match(torch.rand(7, 4), method="greedy").a) == 4
    assert len(match(torch.rand(7, 4), method="random").a) == 4


@pytest.mark.parametrize("method", ["optimal", "greedy", "random"])
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (4, 0), (0, 0)])
def test_no_pairs(method: Any, shape: tuple[int, int]) -> None:
    pairs = match(torch.rand(*shape), count=0, method=method)
    assert [len(each) for each in pairs] == [0, 0, 0]
    assert pairs.a.dtype == torch.int64


def test_huge_and_tiny_differences_together() -> None:
    d = torch.rand(6, 8, dtype=torch.float64) * 10.0 ** torch.randint(-12, 12, (6, 8))
    for count in range(5):
        assert match(d, count=count).cost.sum().item() == pytest.approx(
            cheapest(d.numpy(), count), abs=rounding(d.numpy())
        )


@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e9, 1e18])
@pytest.mark.parametrize("shape", [(6, 7), (7, 5)])
def test_the_scale_of_the_differences_does_not_matter(scale: float, shape: tuple[int, int]) -> None:
    d = torch.rand(*shape, dtype=torch.float64) + 1
    for count in range(1, 5):
        pairs = match(scale * d, count=count)
        assert len(pairs.a) == count
        assert d[pairs.a, pairs.b].sum().item() == pytest.approx(cheapest(d.numpy(), count), rel=1e-12)


def test_equal_differences() -> None:
    for value in (0.0, 1.0, 1e20):
        assert len(match(torch.full((5, 6), value, dtype=torch.float64), count=3).a) == 3


def test_random_depends_on_the_seed_alone() -> None:
    d: Tensor = torch.rand(20, 30)
    one, same, other = (match(d, count=15, method="random", seed=seed) for seed in (1, 1, 2))
    assert_is_matching(one, d.double().numpy())
    assert torch.equal(one.a, same.a) and torch.equal(one.b, same.b)
    assert not torch.equal(one.b, other.b)
    assert torch.equal(match(1 - d, count=15, method="random", seed=1).b, one.b)


def test_the_differences_are_left_as_they_were() -> None:
    d = torch.rand(5, 6, dtype=torch.float64, requires_grad=True)
    before = d.detach().clone()
    pairs = match(d, count=3, threshold=0.5)
    assert torch.equal(d.detach(), before)
    assert not pairs.cost.requires_grad


@pytest.mark.parametrize("count", [-1, 4, 100])
def test_a_count_that_is_not_possible(count: int) -> None:
    with pytest.raises(ValueError, match=rf"cannot choose {count} pairs among 3 and 5 units: 0 to 3 is possible"):
        match(torch.rand(3, 5), count=count)


def test_nan_is_refused() -> None:
    d = torch.rand(3, 3)
    d[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN entries"):
        match(d)


def test_an_unknown_method_is_refused() -> None:
    from jaxtyping import TypeCheckError

    with pytest.raises((ValueError, TypeCheckError), match="best"):
        match(torch.rand(2, 2), method="best")  # type: ignore[arg-type]
