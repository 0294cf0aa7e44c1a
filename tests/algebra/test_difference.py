from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from taskzip.algebra.difference import functional_difference


def curvature(rng: np.random.Generator, d: int, rank: int | None = None, scale: float = 1.0) -> Tensor:
    x = rng.normal(size=(3 * d if rank is None else rank, d)) * scale
    return torch.from_numpy(x.T @ x)


def literal(w_a: Tensor, w_b: Tensor, h_a: Tensor, h_b: Tensor) -> np.ndarray:
    """Eq. 12, pair by pair, with the paper's inverses."""
    metric = np.linalg.inv(np.linalg.inv(h_a.numpy()) + np.linalg.inv(h_b.numpy()))
    d = np.empty((len(w_a), len(w_b)))
    for i, a in enumerate(w_a.numpy()):
        for j, b in enumerate(w_b.numpy()):
            d[i, j] = 0.5 * (a - b) @ metric @ (a - b)
    return d


def least_rise(a: np.ndarray, b: np.ndarray, h_a: np.ndarray, h_b: np.ndarray) -> float:
    """The least of 1/2 (w - a)^T HA (w - a) + 1/2 (w - b)^T HB (w - b) over all w: what eq. 12 stands for."""
    values = [np.linalg.eigh(h) for h in (h_a, h_b)]
    roots = [(vectors * np.sqrt(v.clip(0))).T for v, vectors in values]
    stacked, wanted = np.vstack(roots), np.concatenate([roots[0] @ a, roots[1] @ b])
    w = np.linalg.lstsq(stacked, wanted, rcond=1e-12)[0]
    return float(0.5 * (w - a) @ h_a @ (w - a) + 0.5 * (w - b) @ h_b @ (w - b))


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))
def test_is_equation_12(seed: int, d: int, units_a: int, units_b: int) -> None:
    rng = np.random.default_rng(seed)
    w_a, w_b = torch.from_numpy(rng.normal(size=(units_a, d))), torch.from_numpy(rng.normal(size=(units_b, d)))
    h_a, h_b = curvature(rng, d), curvature(rng, d, scale=3)
    given_ = functional_difference(w_a, w_b, h_a, h_b)
    np.testing.assert_allclose(given_.numpy(), literal(w_a, w_b, h_a, h_b), rtol=1e-8, atol=1e-10)


@given(st.integers(0, 2**32), st.integers(0, 5), st.integers(0, 5))
def test_is_the_least_rise_for_singular_curvatures_too(seed: int, rank_a: int, rank_b: int) -> None:
    rng = np.random.default_rng(seed)
    w_a, w_b = torch.from_numpy(rng.normal(size=(3, 5))), torch.from_numpy(rng.normal(size=(2, 5)))
    h_a, h_b = curvature(rng, 5, rank_a), curvature(rng, 5, rank_b)
    d = functional_difference(w_a, w_b, h_a, h_b)
    wanted = [[least_rise(a, b, h_a.numpy(), h_b.numpy()) for b in w_b.numpy()] for a in w_a.numpy()]
    np.testing.assert_allclose(d.numpy(), wanted, rtol=1e-6, atol=1e-8)


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(0, 6))
def test_is_symmetric_and_never_negative(seed: int, d: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    w_a, w_b = torch.from_numpy(rng.normal(size=(4, d))), torch.from_numpy(rng.normal(size=(3, d)))
    h_a, h_b = curvature(rng, d, min(rank, d)), curvature(rng, d)
    one, other = functional_difference(w_a, w_b, h_a, h_b), functional_difference(w_b, w_a, h_b, h_a)
    assert (one >= 0).all()
    torch.testing.assert_close(one, other.mT, rtol=1e-8, atol=1e-10)


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_is_zero_exactly_between_equal_weights(seed: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    w = torch.from_numpy(rng.normal(size=(4, d)))
    h_a, h_b = curvature(rng, d), curvature(rng, d)
    found = functional_difference(w, w, h_a, h_b)
    size = (w @ h_a * w).sum(1).max().item()
    assert found.diagonal().max().item() <= 1e-12 * size
    apart = ~torch.eye(4, dtype=torch.bool)
    assert (found[apart] > 0).all()


def test_units_that_differ_only_where_one_task_reads_nothing() -> None:
    """Along a dead input of one task merging costs nothing: it takes the other's weight."""
    h_a, h_b = torch.diag(torch.tensor([1.0, 0.0, 2.0])), torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    w = torch.tensor([[1.0, 2.0, 3.0]])
    other = torch.tensor([[1.0, -5.0, 8.0], [2.0, 2.0, 3.0]])
    torch.testing.assert_close(functional_difference(w, other, h_a, h_b), torch.tensor([[0.0, 0.25]]))


def test_scales_with_the_curvatures() -> None:
    rng = np.random.default_rng(0)
    w_a, w_b = torch.from_numpy(rng.normal(size=(4, 5))), torch.from_numpy(rng.normal(size=(4, 5)))
    h_a, h_b = curvature(rng, 5), curvature(rng, 5)
    d = functional_difference(w_a, w_b, h_a, h_b)
    torch.testing.assert_close(functional_difference(w_a, w_b, 7 * h_a, 7 * h_b), 7 * d)
    torch.testing.assert_close(functional_difference(3 * w_a, 3 * w_b, h_a, h_b), 9 * d)


def test_does_not_depend_on_the_order_of_inputs() -> None:
    rng = np.random.default_rng(0)
    w_a, w_b = torch.from_numpy(rng.normal(size=(4, 6))), torch.from_numpy(rng.normal(size=(3, 6)))
    h_a, h_b = curvature(rng, 6), curvature(rng, 6, 2)
    order = torch.randperm(6)
    moved = [h[order][:, order] for h in (h_a, h_b)]
    torch.testing.assert_close(
        functional_difference(w_a[:, order], w_b[:, order], *moved), functional_difference(w_a, w_b, h_a, h_b)
    )


@pytest.mark.parametrize("ratio", [1e-8, 1e-4, 1e4, 1e8])
def test_curvatures_of_very_different_size(ratio: float) -> None:
    """One task's inputs may be pixels of 0 to 255, the other's of 0 to 1, and the balance may be far from even."""
    rng = np.random.default_rng(0)
    w_a, w_b = torch.from_numpy(rng.normal(size=(4, 5))), torch.from_numpy(rng.normal(size=(3, 5)))
    h_a, h_b = curvature(rng, 5), ratio * curvature(rng, 5)
    d = functional_difference(w_a, w_b, h_a, h_b)
    np.testing.assert_allclose(d.numpy(), literal(w_a, w_b, h_a, h_b), rtol=1e-6)
    assert (functional_difference(w_a, w_a, h_a, h_b).diagonal() <= 1e-7 * d.max()).all()


def test_no_units() -> None:
    d = functional_difference(torch.zeros(0, 3), torch.zeros(2, 3), torch.eye(3), torch.eye(3))
    assert d.shape == (0, 2)


def test_shapes_are_checked_while_tests_run() -> None:
    with pytest.raises(TypeCheckError, match="w_b"):
        functional_difference(torch.zeros(2, 3), torch.zeros(2, 4), torch.eye(3), torch.eye(3))
