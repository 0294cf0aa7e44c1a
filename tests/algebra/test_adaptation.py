"""Private weights that follow the shared ones, against a search by a general solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

import taskzip as tz
from taskzip.algebra.adaptation import following, schur_complement
from taskzip.algebra.factored import Factored

SHARED, PRIVATE, UNITS = 4, 3, 5


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def curvature(rows: int, damping: float, seed: int = 0) -> Factored:
    x = drawn(seed, rows, SHARED + PRIVATE)
    return Factored(x, torch.full((SHARED + PRIVATE,), damping, dtype=torch.float64))


def least(h: np.ndarray, change: np.ndarray, exists: np.ndarray) -> tuple[float, np.ndarray]:
    """The least that (dS, dP)^T H (dS, dP) can be, and the dP that does it, found by a solver that knows no algebra."""

    def error(p: np.ndarray) -> float:
        both = np.concatenate([change, np.where(exists, p, 0)])
        return float(both @ h @ both)

    found = minimize(error, np.zeros(PRIVATE), method="BFGS", options={"gtol": 1e-12})
    return float(found.fun), np.where(exists, found.x, 0)


@pytest.mark.parametrize("rows, damping", [(30, 0.1), (30, 0.0), (3, 0.1), (6, 1e-3)])
@pytest.mark.parametrize("factored", [False, True])
def test_private_weights_follow_as_well_as_they_can(rows: int, damping: float, factored: bool) -> None:
    h = curvature(rows, damping)
    matrix, change = h.dense().numpy(), drawn(1, UNITS, SHARED)
    left = schur_complement(h if factored else h.dense(), SHARED)
    left = left.dense() if isinstance(left, Factored) else left
    own = following(h if factored else h.dense(), change, None)
    for k in range(UNITS):
        error, best = least(matrix, change[k].numpy(), np.ones(PRIVATE, bool))
        assert float(change[k] @ left @ change[k]) == pytest.approx(error, rel=1e-6, abs=1e-9)
        np.testing.assert_allclose(own[k], best, atol=1e-4)


@pytest.mark.parametrize("factored", [False, True])
def test_missing_connections_stay_missing_while_the_others_follow(factored: bool) -> None:
    h = curvature(20, 0.05)
    change, exists = drawn(1, UNITS, SHARED), drawn(2, UNITS, PRIVATE) > 0
    assert 0 < exists.sum() < exists.numel()
    own = following(h if factored else h.dense(), change, exists)
    assert (own[~exists] == 0).all()
    for k in range(UNITS):
        np.testing.assert_allclose(own[k], least(h.dense().numpy(), change[k].numpy(), exists[k].numpy())[1], atol=1e-4)


@pytest.mark.parametrize("rows", [2, 3, 6])
def test_factored_without_damping_is_the_limit_of_little_damping(rows: int) -> None:
    at_all = schur_complement(curvature(rows, 0.0), SHARED)
    hardly = schur_complement(curvature(rows, 1e-9).dense(), SHARED)
    assert isinstance(at_all, Factored)
    torch.testing.assert_close(at_all.dense(), hardly, atol=1e-6, rtol=1e-6)


def fc(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)).double().eval()


def zipped_of(models: list[nn.Sequential], data: list[Tensor], **options: object) -> tz.ZippedModel:
    tasks = [tz.Task("abc"[i], m, [x]) for i, (m, x) in enumerate(zip(models, data, strict=True))]
    settings: dict[str, object] = {"compensate": False, "progress": False, "max_rows": None, **options}
    return tz.zip(tasks, share={"0": 4, "2": 5}, **settings)  # type: ignore[arg-type]


def second_layer(zipped: tz.ZippedModel, task: str) -> tuple[Tensor, Tensor]:
    """The dense weights of the second layer with the bias, and which of them it shares."""
    weight, bias = zipped[task][2].weight.detach(), zipped[task][2].bias.detach()
    others = [p for name in zipped if name != task for p in zipped[name].parameters()]
    shared = torch.zeros(7, 9, dtype=torch.bool)
    shared[:5, :4] = shared[:5, -1] = True
    assert any(p.shape == (5, 4) and any(p is other for other in others) for p in zipped[task].parameters())
    return torch.cat([weight, bias[:, None]], 1), shared


def read(zipped: tz.ZippedModel, task: str, x: Tensor) -> Tensor:
    """What the second layer reads."""
    with torch.no_grad():
        h = zipped[task][1](zipped[task][0](x))
    return torch.cat([h, h.new_ones(len(h), 1)], 1)


def test_no_other_private_weights_do_better_for_the_layer() -> None:
    """After zipping the gradient of the damped layer error is 0 at the private weights of shared units."""
    models, data = [fc(0), fc(1)], [drawn(3, 60, 6), drawn(4, 50, 6)]
    first_only = [tz.Task("ab"[i], models[i], [data[i]]) for i in range(2)]
    before = tz.zip(first_only, share={"0": 4}, compensate=False, progress=False, max_rows=None)
    zipped = zipped_of(models, data, adapt=True)
    stays = zipped_of(models, data, adapt=False)
    for task, x in zip("ab", data, strict=True):
        inputs = read(zipped, task, x)
        assert torch.allclose(inputs, read(before, task, x))
        h = inputs.T @ inputs / len(x) / 2
        h = h + 1e-2 * h.diagonal().mean() * torch.eye(9, dtype=torch.float64)
        now, shared = second_layer(zipped, task)
        unzipped = torch.cat([before[task][2].weight.detach(), before[task][2].bias.detach()[:, None]], 1)
        old = unzipped[closest_rows(unzipped, now)]
        gradient = (now - old) @ h
        assert gradient[:5][~shared[:5]].abs().max() < 1e-10
        assert gradient[:5][shared[:5]].abs().max() > 1e-3
    total = [sum(layer.cost for layer in each.history.layers) for each in (zipped, stays)]
    assert total[0] < total[1]


def closest_rows(old: Tensor, now: Tensor) -> list[int]:
    """Which unit of the network before stands in each place: those that are not shared, and what is left, by trying."""
    from itertools import permutations

    own = [int((old - row).abs().sum(1).argmin()) for row in now[5:]]
    assert all((old[place] - row).abs().max() < 1e-12 for place, row in zip(own, now[5:], strict=True))
    left = [k for k in range(7) if k not in own]
    best = min(permutations(left), key=lambda order: float((old[list(order)] - now[:5]).square().sum()))
    return [*best, *own]


def test_networks_that_agree_stay_exactly_as_they_are() -> None:
    model, x = fc(0), drawn(3, 60, 6)
    zipped = zipped_of([model, model], [x, x], adapt=True)
    with torch.no_grad():
        assert torch.allclose(zipped["a"](x), model(x), atol=1e-12)


@pytest.mark.parametrize("tasks", [2, 3])
def test_what_several_tasks_share_stays_the_same_for_all_of_them(tasks: int) -> None:
    models, data = [fc(seed) for seed in range(tasks)], [drawn(seed, 40 + seed, 6) for seed in range(tasks)]
    zipped = zipped_of(models, data, compensate=True)
    assert zipped.history.settings["adapt"] is True
    for task, x in zip(zipped, data, strict=True):
        with torch.no_grad():
            assert torch.allclose(zipped.materialize(task)(x), zipped[task](x), atol=1e-12)


def test_zeros_of_pruned_networks_stay_zeros() -> None:
    models, data = [fc(0), fc(1)], [drawn(3, 60, 6), drawn(4, 50, 6)]
    with torch.no_grad():
        for k, model in enumerate(models):
            model[2].weight[drawn(9 + k, 7, 8) > 0] = 0
    before = [int((model[2].weight != 0).sum()) for model in models]
    zipped = zipped_of(models, data, adapt=True)
    assert zipped.connection_count() <= sum(before) + sum(
        int((m.weight != 0).sum()) for model in models for m in (model[0], model[4])
    )
    for k, task in enumerate(zipped):
        assert (zipped.materialize(task)[2].weight[:5, 4:] == 0).any(), before[k]


def test_following_is_off_in_the_paper_s_own_procedure() -> None:
    models, data = [fc(0), fc(1)], [drawn(3, 60, 6), drawn(4, 50, 6)]
    assert zipped_of(models, data).history.settings["adapt"] is False
