from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from taskzip.difference import functional_difference
from taskzip.merging import merge_weights


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


def test_as_many_weights_as_curvatures() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        merge_weights([weights(2, 3), weights(2, 3)], [curvature(3)])
