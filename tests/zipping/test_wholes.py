"""Units that keep together: groups of a group-norm belong to groups, and channels find their partners inside."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from graph.orders import Net
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import taskzip as tz
from taskzip.planning.plan import Quota
from taskzip.zipping.wholes import match_within, partners

DOUBLE = torch.float64
Case = tuple[np.ndarray, np.ndarray, np.ndarray]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Costs between joint and new units, and the whole of each."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    count, one, other = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    joint, new = rng.permutation(np.arange(count).repeat(one)), rng.permutation(np.arange(count).repeat(other))
    return rng.random((len(joint), len(new))), joint, new


def inner(cost: np.ndarray) -> float:
    """The least cost of as many pairs as fit, by trying all."""
    cost = cost if cost.shape[0] <= cost.shape[1] else cost.T
    columns = itertools.permutations(range(cost.shape[1]), len(cost))
    return min(sum(cost[i, j] for i, j in enumerate(each)) for each in columns)


@given(cases())
def test_wholes_are_put_together_at_least_cost(case: Case) -> None:
    cost, joint, new = case
    count = 1 + new.max()
    total = [[inner(cost[np.ix_(joint == i, new == j)]) for j in range(count)] for i in range(count)]
    best = min(sum(total[i][j] for j, i in enumerate(each)) for each in itertools.permutations(range(count)))
    found = partners(cost, joint, new)
    assert sorted(found) == list(range(count))
    assert sum(total[i][j] for j, i in enumerate(found)) == pytest.approx(best)


@pytest.mark.parametrize("method", ["optimal", "greedy", "random"])
@given(case=cases(), part=st.floats(0, 1))
def test_pairs_lie_in_wholes_that_belong_together(case: Case, part: float, method: Any) -> None:
    cost, joint, new = case
    within = np.equal.outer(joint, partners(cost, joint, new)[new])
    most = min(len(joint), len(new))
    pairs = match_within(cost, within, Quota(round(part * most)), method=method, seed=1)
    assert len(pairs.a) == round(part * most)
    a, b = pairs.a.numpy(), pairs.b.numpy()
    assert within[a, b].all()
    assert pairs.cost.tolist() == cost[a, b].tolist()
    limited = match_within(cost, within, Quota(most, 0.3), method=method, seed=1)
    assert (limited.cost <= 0.3).all()
    if method == "optimal":
        assert len(limited.a) > 0 or cost[within].min() > 0.3


def test_random_pairs_inside_of_wholes_are_not_the_cheapest() -> None:
    cost, within = 1 - np.eye(8), np.kron(np.eye(2), np.ones((4, 4))) > 0
    found = [float(match_within(cost, within, Quota(8), method="random", seed=s).cost.sum()) for s in range(5)]
    assert min(found) > 0 and len(set(found)) > 1


# --- zipping ------------------------------------------------------------------------------------------------------


def images(samples: int) -> Tensor:
    return torch.randn(samples, 2, 5, 5, dtype=DOUBLE)


def chain(groups: int = 4, width: int = 8) -> nn.Module:
    second = nn.Conv2d(width, 6, 3, padding=1)
    norm = nn.GroupNorm(groups, width)
    layers = [nn.Conv2d(2, width, 3, padding=1), norm, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(150, 3)]
    return nn.Sequential(*layers)


def flattened() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))


def residual() -> nn.Module:
    def do(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        for norm, first, second in zip(m.norms, m.first, m.second, strict=True):
            x = x + second(first(norm(x).relu()).relu())
        return m.out(x.relu().mean((2, 3)))

    return Net(
        do,
        stem=nn.Conv2d(2, 8, 3),
        norms=nn.ModuleList(nn.GroupNorm(4, 8) for _ in range(2)),
        first=nn.ModuleList(nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.GroupNorm(2, 6)) for _ in range(2)),
        second=nn.ModuleList(nn.Conv2d(6, 8, 1) for _ in range(2)),
        out=nn.Linear(8, 3),
    )


def drawn(model: nn.Module) -> nn.Module:
    model = model.to(DOUBLE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def reordered(model: nn.Module, seed: int) -> nn.Module:
    structure, rng, other = tz.inspect(model, images(2)), np.random.default_rng(seed), copy.deepcopy(model)
    for index, space in enumerate(structure.spaces):
        structure.reorder(other, index, rng.permutation(len(space.units)))
    return other


def run_zip(models: Sequence[nn.Module], x: Tensor, **options: Any) -> tz.ZippedModel:
    tasks = [tz.Task(str(k), model, [x]) for k, model in enumerate(models)]
    return tz.zip(tasks, **{"share": 1.0, "progress": False} | options)


def assert_same(zipped: tz.ZippedModel, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        for task in zipped:
            torch.testing.assert_close(zipped[task](x), model(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "copies", "options"),
    [
        (chain, 2, {}),
        (lambda: chain(1), 1, {}),
        (lambda: chain(8), 1, {}),
        (chain, 1, {"matching": "greedy"}),
        (chain, 1, {"share": 0.5}),
        (chain, 1, {"share": 0.5, "aligned": True}),
        (chain, 1, {"share": tz.Threshold(1e-9)}),
        (chain, 1, {"cross": False}),
        (flattened, 1, {}),
        (residual, 2, {}),
        (residual, 1, {"share": 0.5}),
        (residual, 1, {"residual": "independent"}),
    ],
)
def test_a_reordered_copy_is_found(make: Callable[[], nn.Module], copies: int, options: dict[str, Any]) -> None:
    model, x = drawn(make()), images(40)
    zipped = run_zip([model, *(reordered(model, seed) for seed in range(1, 1 + copies))], x, **options)
    assert sum(record.cost for record in zipped.history.layers) < 1e-9
    if options.get("cross", True) or options.get("share", 1.0) == 1.0:
        assert_same(zipped, model, x)
    if "share" not in options:
        private = sum(p.numel() for name, p in model.named_parameters() if "norm" in name) + 200
        whole = sum(p.numel() for p in model.parameters())
        assert zipped.parameter_count() < whole + copies * (private + 3 * 151)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("width", [8, 16])
def test_shared_units_stand_in_groups_that_belong_together(share: float, width: int) -> None:
    """Independent networks, one of them perhaps wider: the groups of which are paired, and units inside of them."""
    models, x = [drawn(chain(4, 8)), drawn(chain(4, width))], images(40)
    zipped = run_zip(models, x, share={"0": share}, own_scale=False)
    assert zipped.history.layers[0].shared == round(8 * share)
    state = zipped.materialize("0")[0].weight, zipped.materialize("1")[0].weight
    same = (state[0][:, None] == state[1][None]).flatten(2).all(2).nonzero().tolist()
    assert len(same) == round(8 * share)
    pairs = {(a // 2, b // (width // 4)) for a, b in same}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@pytest.mark.parametrize("groups", [2, 1, 8])
def test_other_numbers_of_groups_pair_freely(groups: int) -> None:
    models, x = [drawn(chain(4)), drawn(chain(groups))], images(40)
    zipped = run_zip(models, x)
    assert zipped.history.layers[0].shared == 8
    for task in zipped:
        with torch.no_grad():
            torch.testing.assert_close(zipped.materialize(task)(x), zipped[task](x), rtol=1e-10, atol=1e-10)
            assert zipped[task](x).isfinite().all()


@pytest.mark.parametrize("matching", ["optimal", "greedy", "random"])
def test_independent_streams_with_group_norm(matching: str) -> None:
    models, x = [drawn(residual()) for _ in range(2)], images(40)
    zipped = run_zip(models, x, share=0.5, matching=matching)
    assert [record.shared for record in zipped.history.layers] == [4, 3, 4, 3, 4, 0]
    for task in zipped:
        with torch.no_grad():
            torch.testing.assert_close(zipped.materialize(task)(x), zipped[task](x), rtol=1e-10, atol=1e-10)
