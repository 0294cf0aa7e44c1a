"""Faults planted in every step of a zip are found, and named by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import taskzip as tz
import taskzip.algebra.curvature
import taskzip.algebra.guard
import taskzip.zipping.joining
import taskzip.zipping.meeting
import taskzip.zipping.own_scales
import taskzip.zipping.steps
import taskzip.zipping.zipper
from taskzip.algebra.curvature import LayerStatistics
from taskzip.zipping.members import Member

DOUBLE = torch.float64
Plant = pytest.MonkeyPatch


def network(*, norm: bool = False, width: int = 12) -> nn.Sequential:
    def hidden(reads: int) -> list[nn.Module]:
        return [nn.Linear(reads, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()]

    model = nn.Sequential(*hidden(6), *hidden(width), nn.Linear(width, 3)).to(DOUBLE)
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.Linear):
                module.weight.mul_(2)
        for _ in range(30):
            model(vectors(64))
    return model.eval()


def vectors(samples: int = 200) -> Tensor:
    return torch.randn(samples, 6, dtype=DOUBLE)


def tasks(**options: Any) -> list[tz.Task]:
    """Two networks that differ by noise, so that sharing costs little, with units in different orders."""
    first, second = network(**options), network(**options)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    member = Member(tz.Task("b", second, [vectors()]), 0)
    for space in range(len(member.structure.spaces)):
        member.structure.reorder(second, space, np.random.default_rng(space).permutation(12))
    return [tz.Task("a", first, [vectors()]), tz.Task("b", second, [vectors()])]


def rolled(function: Callable[..., Any], dim: int = 0) -> Callable[..., Any]:
    """The same function, with what it returns in a wrong order."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        return tuple(each.roll(1, dim) for each in found) if isinstance(found, tuple) else found.roll(1, dim)

    return wrong


def assert_found(given: list[tz.Task], what: str, **options: Any) -> None:
    with pytest.raises(tz.GraphError, match=f"layer '[024]'.*{what}"):
        tz.zip(given, share=0.5, progress=False, **options)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_sound_zips_raise_nothing(norm: bool, share: float) -> None:
    tz.zip(tasks(norm=norm), share=share, progress=False)


def test_pairs_in_a_wrong_order(monkeypatch: Plant) -> None:
    match = taskzip.zipping.joining.match

    def wrong(d: Tensor, **kwargs: Any) -> Any:
        pairs = match(d, **kwargs)
        return pairs._replace(b=pairs.b.roll(1))

    monkeypatch.setattr(taskzip.zipping.joining, "match", wrong)
    assert_found(tasks(), "merging its units costs more")


def test_dear_pairs(monkeypatch: Plant) -> None:
    """A matching that takes the dearest pairs."""
    match = taskzip.zipping.joining.match

    def wrong(d: Tensor, **kwargs: Any) -> Any:
        pairs = match(d.max() - d, **kwargs)
        return pairs._replace(cost=d[pairs.a, pairs.b])

    monkeypatch.setattr(taskzip.zipping.joining, "match", wrong)
    assert_found(tasks(), "dearer than units paired in the order")


@pytest.mark.parametrize("dim", [0, 1])
def test_solved_weights_in_a_wrong_order(monkeypatch: Plant, dim: int) -> None:
    """Units (0) and inputs (1)."""
    monkeypatch.setattr(taskzip.zipping.steps, "least_squares", rolled(taskzip.zipping.steps.least_squares, dim))
    assert_found(tasks(), "least squares raises its error")


def test_answers_in_a_wrong_order(monkeypatch: Plant) -> None:
    """By their own sums, weights that are solved for wrong answers look good."""
    update = LayerStatistics.update

    def wrong(self: LayerStatistics, rows: Tensor, answers: Tensor, weight: float = 1.0) -> None:
        update(self, rows, answers.roll(1, 1) if changed else answers, weight)

    changed = False
    install = taskzip.zipping.zipper.install_blocks

    def after(*args: Any) -> None:
        nonlocal changed
        install(*args)
        changed = True

    monkeypatch.setattr(LayerStatistics, "update", wrong)
    monkeypatch.setattr(taskzip.zipping.zipper, "install_blocks", after)
    assert_found(tasks(), "its units stand in another order than their answers")


def test_orders_that_are_not_what_they_were(monkeypatch: Plant) -> None:
    original_rows = Member.original_rows

    def wrong(self: Member, layer: Any) -> Tensor | None:
        found = original_rows(self, layer)
        return None if found is None else found.roll(1)

    given = tasks()
    monkeypatch.setattr(Member, "original_rows", wrong)
    assert_found(given, "its units stand in another order than was read")


@pytest.mark.parametrize("dim", [0, 1])
def test_merged_weights_in_a_wrong_order(monkeypatch: Plant, dim: int) -> None:
    monkeypatch.setattr(taskzip.zipping.meeting, "merge_weights", rolled(taskzip.zipping.meeting.merge_weights, dim))
    assert_found(tasks(), "merging its units costs more")


def test_spread_in_a_wrong_order(monkeypatch: Plant) -> None:
    def wrong(statistics: Any, weights: Any, units: Any, balance: Any) -> Any:
        scale, shift = match_spread(statistics, weights, units, balance)
        return scale * torch.linspace(0.2, 3, len(scale), dtype=DOUBLE), shift

    match_spread = taskzip.zipping.joining.match_spread
    monkeypatch.setattr(taskzip.zipping.joining, "match_spread", wrong)
    assert_found(tasks(), "the spread of its units", own_scale=False)


def test_own_scales_in_a_wrong_order(monkeypatch: Plant) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        scale, shift = own_scale(*args, **kwargs)
        return 3 * scale.roll(1), shift.roll(1)

    own_scale = taskzip.zipping.own_scales.own_scale
    monkeypatch.setattr(taskzip.zipping.own_scales, "own_scale", wrong)
    assert_found(tasks(), "least squares raises its error")


def test_batch_norm_in_a_wrong_order(monkeypatch: Plant) -> None:
    monkeypatch.setattr(
        taskzip.zipping.steps, "batch_norm_statistics", rolled(taskzip.zipping.steps.batch_norm_statistics)
    )
    assert_found(tasks(norm=True), "batch-norm's statistics")


def test_swapped_inputs(monkeypatch: Plant) -> None:
    """What a layer is said to read are the inputs of others."""
    update = LayerStatistics.update
    monkeypatch.setattr(
        LayerStatistics, "update", lambda self, rows, answers, weight=1.0: update(self, rows.flip(1), answers, weight)
    )
    assert_found(tasks(), "what it reads does not give what it answers")


def test_inputs_that_are_assembled_in_a_wrong_order(monkeypatch: Plant) -> None:
    import taskzip.zipping.assembly

    natural = taskzip.zipping.assembly._natural
    monkeypatch.setattr(
        taskzip.zipping.assembly,
        "_natural",
        lambda order: tuple(np.roll(natural(order) or range(len(order)), 1).tolist()),
    )
    assert_found(tasks(), "blocks make up other weights")
