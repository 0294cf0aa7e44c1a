from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from taskzip.algebra.difference import functional_difference
from taskzip.algebra.factored import Factored
from taskzip.algebra.merging import merge_weights


def curvature(d: int, rank: int | None = None) -> Tensor:
    x = torch.randn(3 * d if rank is None else rank, d, dtype=torch.float64)
    return x.mT @ x


def weights(units: int, d: int) -> Tensor:
    return torch.randn(units, d, dtype=torch.float64)


def rise(w: Tensor, parents: list[Tensor], curvatures: list[Tensor]) -> Tensor:
    """The summed layer error of the tasks, per unit: sum over t of 1/2 (w - w_t)^T H_t (w - w_t)."""
    return sum(0.5 * ((w - p) @ h * (w - p)).sum(1) for p, h in zip(parents, curvatures, strict=True))


@pytest.mark.parametrize("d, units", [(1, 1), (4, 3), (9, 2)])
def test_is_equations_10_and_11(d: int, units: int) -> None:
    """Literally: each parent plus its own update, both of which end in the same place."""
    w_a, w_b, h_a, h_b = weights(units, d), weights(units, d), curvature(d), curvature(d)
    inverse_a, inverse_b = np.linalg.inv(h_a.numpy()), np.linalg.inv(h_b.numpy())
    middle = np.linalg.inv(inverse_a + inverse_b)
    from_a = [a + inverse_a @ middle @ (b - a) for a, b in zip(w_a.numpy(), w_b.numpy(), strict=True)]
    from_b = [b + inverse_b @ middle @ (a - b) for a, b in zip(w_a.numpy(), w_b.numpy(), strict=True)]
    np.testing.assert_allclose(from_a, from_b, rtol=1e-8)
    np.testing.assert_allclose(merge_weights([w_a, w_b], [h_a, h_b]).numpy(), from_a, rtol=1e-8)


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 4))
def test_merging_three_at_once_or_one_by_one_is_the_same(seed: int, d: int, units: int) -> None:
    torch.manual_seed(seed)
    w, h = [weights(units, d) for _ in range(3)], [curvature(d) for _ in range(3)]
    at_once = merge_weights(w, h)
    step = merge_weights([merge_weights(w[:2], h[:2]), w[2]], [h[0] + h[1], h[2]])
    torch.testing.assert_close(step, at_once, rtol=1e-6, atol=1e-8)
    turned = merge_weights([w[2], w[0], w[1]], [h[2], h[0], h[1]])
    torch.testing.assert_close(turned, at_once, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_the_gradient_of_the_error_is_zero_there(tasks: int) -> None:
    parents, curvatures = [weights(4, 6) for _ in range(tasks)], [curvature(6) for _ in range(tasks)]
    w = merge_weights(parents, curvatures).requires_grad_()
    rise(w, parents, curvatures).sum().backward()
    assert w.grad is not None
    assert w.grad.abs().max() < 1e-9 * sum(h.abs().max() for h in curvatures)


@pytest.mark.parametrize("rank_a, rank_b", [(None, None), (2, None), (2, 1), (0, 3), (0, 0)])
def test_the_rise_is_the_functional_difference(rank_a: int | None, rank_b: int | None) -> None:
    w_a, w_b, h_a, h_b = weights(5, 6), weights(5, 6), curvature(6, rank_a), curvature(6, rank_b)
    merged = merge_weights([w_a, w_b], [h_a, h_b])
    d = functional_difference(w_a, w_b, h_a, h_b).diagonal()
    torch.testing.assert_close(rise(merged, [w_a, w_b], [h_a, h_b]), d, rtol=1e-7, atol=1e-9)
    for _ in range(20):
        assert (rise(merged + 0.1 * weights(5, 6), [w_a, w_b], [h_a, h_b]) >= d - 1e-9).all()


def test_equal_parents_stay_as_they_are() -> None:
    w = weights(4, 6)
    torch.testing.assert_close(merge_weights([w, w], [curvature(6), curvature(6)]), w)


def test_equal_curvatures_give_the_mean() -> None:
    w_a, w_b, h = weights(4, 6), weights(4, 6), curvature(6)
    torch.testing.assert_close(merge_weights([w_a, w_b], [h, h]), (w_a + w_b) / 2)
    torch.testing.assert_close(merge_weights([w_a, w_b], [3 * h, h]), (3 * w_a + w_b) / 4)


def test_an_input_that_one_task_never_reads_takes_the_other_weight() -> None:
    h_a, h_b = curvature(4), curvature(4)
    h_a[2] = h_a[:, 2] = 0
    w_a, w_b = weights(3, 4), weights(3, 4)
    w_b = torch.cat([w_a[:, :2], w_b[:, 2:3], w_a[:, 3:]], dim=1)
    torch.testing.assert_close(merge_weights([w_a, w_b], [h_a, h_b]), w_b)


def spread_over(d: int) -> Factored:
    return Factored(torch.randn(2, d, dtype=torch.float64), torch.full((d,), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("made", [curvature, spread_over])
@pytest.mark.parametrize("masked", [False, True])
def test_errors_of_rows_that_matter_more_count_more(made: Callable[[int], Tensor | Factored], masked: bool) -> None:
    """Each row as if merged alone, with its curvatures times what it counts."""
    d, counts = 7, [torch.tensor([1.0, 8, 2, 1e-5, 0.25]).double(), torch.tensor([1.0, 1, 8, 1, 0.25]).double()]
    parents, curvatures = [weights(5, d), weights(5, d)], [made(d), made(d)]
    exists = torch.rand(5, d) < 0.6 if masked else None
    found = merge_weights(parents, curvatures, exists, counts)
    for k in range(5):
        least = counts[1][k] / 1024
        times = [float(counts[0][k].clamp_min(least)), float(counts[1][k])]
        alone = merge_weights(
            [w[k, None] for w in parents],
            [t * h for t, h in zip(times, curvatures, strict=True)],
            None if exists is None else exists[k, None],
        )
        torch.testing.assert_close(found[k, None], alone, rtol=1e-6, atol=1e-9)


def test_ratios_are_rounded_at_little_cost() -> None:
    """With counts in between two powers of two, the weighted error is at most 3% above the least."""
    parents, curvatures = [weights(40, 6), weights(40, 6)], [curvature(6), curvature(6)]
    counts = torch.rand(2, 40, dtype=torch.float64).mul(6).exp2()
    merged = merge_weights(parents, curvatures, None, list(counts))
    for k in range(40):
        hs, own = [c * h for c, h in zip(counts[:, k], curvatures, strict=True)], [w[k, None] for w in parents]
        least = functional_difference(*own, *hs)[0]
        assert least <= rise(merged[k, None], own, hs) + 1e-9 <= 1.031 * least + 1e-9


def test_three_tasks_count_by_themselves() -> None:
    parents, h = [weights(1, 1) for _ in range(3)], torch.ones(1, 1, dtype=torch.float64)
    counts = [torch.tensor([c]).double() for c in (4, 1, 2)]
    merged = merge_weights(parents, [h, h, h], None, counts)
    torch.testing.assert_close(merged, (4 * parents[0] + parents[1] + 2 * parents[2]) / 7)


def test_equal_parents_stay_to_the_last_bit_whatever_they_count() -> None:
    w, counts = weights(4, 6), [torch.rand(4).double() + 0.01 for _ in range(2)]
    assert torch.equal(merge_weights([w, w], [curvature(6), curvature(6)], None, counts), w)


def test_as_many_weights_as_curvatures() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        merge_weights([weights(2, 3), weights(2, 3)], [curvature(3)])
