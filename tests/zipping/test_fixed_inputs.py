"""Hidden units in a fixed order: a later layer reads them in common by position."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph.orders import Net
from torch import Tensor, nn

import taskzip as tz

DOUBLE = torch.float64


def vectors(samples: int) -> Tensor:
    return torch.randn(samples, 5, dtype=DOUBLE)


def images(samples: int) -> Tensor:
    return torch.randn(samples, 2, 6, 6, dtype=DOUBLE)


def pinned_in_the_middle(middle: int = 6) -> nn.Module:
    """`middle` cannot move; 6 + 7 units behind it can."""
    return Net(
        lambda m, x: m.out(m.last(m.next(m.middle(m.first(x).relu()).cumsum(1).tanh()).relu()).relu()),
        first=nn.Linear(5, 8),
        middle=nn.Linear(8, middle),
        next=nn.Linear(middle, 6),
        last=nn.Linear(6, 7),
        out=nn.Linear(7, 3),
    ).to(DOUBLE)


def behind_a_transformer() -> nn.Module:
    """A spatial transformer turns the image before the first convolution reads it."""

    def do(m: nn.Module, x: Tensor) -> Tensor:
        grid = F.affine_grid(m.where(x.flatten(1)).view(-1, 2, 3), list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
        return m.out(m.second(m.first(x).relu()).relu().mean((2, 3)))

    layers = {"where": nn.Linear(72, 6), "first": nn.Conv2d(2, 6, 3), "second": nn.Conv2d(6, 5, 3)}
    return Net(do, **layers, out=nn.Linear(5, 3)).to(DOUBLE)


def partly_fixed() -> nn.Module:
    """Of what `next` reads 4 units move and 3 do not."""
    return Net(
        lambda m, x: m.out(m.next(torch.cat([m.free(x).relu(), m.held(x).cumsum(1)], 1)).relu()),
        free=nn.Linear(5, 4),
        held=nn.Linear(5, 3),
        next=nn.Linear(7, 6),
        out=nn.Linear(6, 3),
    ).to(DOUBLE)


def reordered(model: nn.Module, x: Tensor) -> nn.Module:
    structure, rng, other = tz.inspect(model, x), np.random.default_rng(7), copy.deepcopy(model)
    for index, space in enumerate(structure.spaces):
        structure.reorder(other, index, rng.permutation(len(space.units)))
    return other


def run_zip(models: list[nn.Module], x: Tensor, **options: Any) -> tz.ZippedModel:
    tasks = [tz.Task(name, model, [x]) for name, model in zip("ab", models, strict=True)]
    return tz.zip(tasks, **{"share": 1.0, "progress": False} | options)


def shared(zipped: tz.ZippedModel) -> dict[str, int]:
    return {record.name: record.shared for record in zipped.history.layers}


def saved(zipped: tz.ZippedModel) -> dict[str, int]:
    return {record.name: record.before - record.after for record in zipped.history.layers}


CASES: list[tuple[Callable[[], nn.Module], Callable[[int], Tensor], dict[str, int]]] = [
    (
        pinned_in_the_middle,
        vectors,
        {"first": 8 * 6, "middle": 0, "next": 6 * 7, "last": 7 * 7, "out": 0},
    ),
    (behind_a_transformer, images, {"where": 0, "first": 6 * (2 * 9 + 1), "second": 5 * (6 * 9 + 1), "out": 0}),
    (partly_fixed, vectors, {"free": 4 * 6, "held": 0, "next": 6 * 8, "out": 0}),
]


@pytest.mark.parametrize(("make", "inputs", "wanted"), CASES)
def test_a_copy_is_found_behind_a_pinned_layer(
    make: Callable[[], nn.Module], inputs: Callable[[int], Tensor], wanted: dict[str, int]
) -> None:
    model, x = make(), inputs(40)
    zipped = run_zip([model, reordered(model, x)], x, own_scale=False)
    assert saved(zipped) == wanted
    with torch.no_grad():
        for task in "ab":
            torch.testing.assert_close(zipped[task](x), model(x), rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(zipped.materialize(task)(x), model(x), rtol=1e-8, atol=1e-8)


def test_descendants_of_one_network_share_what_is_behind_it() -> None:
    """Two fine-tuned networks: the units that stay are still the same ones."""
    base, x = pinned_in_the_middle(), vectors(60)
    models = [copy.deepcopy(base) for _ in range(2)]
    with torch.no_grad():
        for parameter in (p for model in models for p in model.parameters()):
            parameter.add_(1e-3 * torch.randn_like(parameter))
    zipped = run_zip(models, x)
    assert shared(zipped) == {"first": 8, "middle": 0, "next": 6, "last": 7, "out": 0}
    with torch.no_grad():
        for task, model in zip("ab", models, strict=True):
            assert (zipped[task](x) - model(x)).abs().max() < 1e-2


def test_other_numbers_of_fixed_units_have_nothing_in_common() -> None:
    zipped = run_zip([pinned_in_the_middle(6), pinned_in_the_middle(5)], vectors(30))
    assert shared(zipped) == {"first": 8, "middle": 0, "next": 0, "last": 0, "out": 0}
    assert "no inputs in common" in zipped.history.layers[2].note


def test_common_parts_do_not_read_what_each_task_computes_by_itself() -> None:
    model, x = pinned_in_the_middle(), vectors(40)
    zipped = run_zip([model, copy.deepcopy(model)], x, cross=False)
    assert shared(zipped) == {"first": 8, "middle": 0, "next": 0, "last": 0, "out": 0}
    with torch.no_grad():
        together = zipped(x)
        for task in "ab":
            torch.testing.assert_close(together[task], zipped[task](x))
