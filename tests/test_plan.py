from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from taskzip.errors import InputError
from taskzip.plan import Budget, MaxDrop, Quota, Share, Threshold, as_plan


@pytest.mark.parametrize("amount", [0, 0.0, 0.25, 0.5, 1, 1.0])
@pytest.mark.parametrize("units", [1, 2, 7, 10, 300])
def test_a_fraction_of_the_units_of_every_layer(amount: float, units: int) -> None:
    assert Share(amount).quota("any", units) == Quota(round(amount * units), None)


def test_one_is_everything_for_all_layers_but_one_unit_for_one_layer() -> None:
    assert Share(1).quota("fc", 8) == Quota(8)
    assert Share({"fc": 1}).quota("fc", 8) == Quota(1)
    assert Share({"fc": 1.0}).quota("fc", 8) == Quota(8)


def test_counts_and_fractions_by_layer() -> None:
    plan = Share({"conv1": 3, "conv2": 0.5, "fc": 0})
    assert plan.quota("conv1", 20) == Quota(3)
    assert plan.quota("conv2", 50) == Quota(25)
    assert plan.quota("fc", 50) == Quota(0)
    assert plan.quota("not named", 50) == Quota(0)
    assert list(plan.named()) == ["conv1", "conv2", "fc"]
    assert list(Share(0.5).named()) == []


@pytest.mark.parametrize("amount", [np.float64(0.5), np.float32(0.5), Fraction(1, 2)])
def test_any_real_number_is_a_fraction(amount: Any) -> None:
    assert Share(amount).quota("fc", 8) == Quota(4)
    assert Share({"fc": amount}).quota("fc", 8) == Quota(4)


def test_a_numpy_integer_is_a_count() -> None:
    assert Share({"fc": np.int64(3)}).quota("fc", 8) == Quota(3)


def test_a_count_above_the_units_names_both() -> None:
    assert Share({"fc": 8}).quota("fc", 8) == Quota(8)
    with pytest.raises(InputError, match=r"share for layer 'fc' asks for 9 shared units, but .* has 8"):
        Share({"fc": 9}).quota("fc", 8)


@pytest.mark.parametrize("amount", [-0.1, 1.01, 2, float("nan"), float("inf"), "half", None, True, [0.5], 1j])
def test_what_is_no_share(amount: Any) -> None:
    with pytest.raises(InputError, match="give a fraction from 0 to 1"):
        as_plan(amount)


@pytest.mark.parametrize("amount", [-1, -0.1, 1.01, float("nan"), "half", None, False])
def test_what_is_no_share_of_a_layer(amount: Any) -> None:
    with pytest.raises(InputError, match=r"share for layer 'fc' is .*: give a fraction .* or a count"):
        as_plan({"conv": 0.5, "fc": amount})


def test_threshold_for_all_layers() -> None:
    plan = Threshold(0.25)
    assert plan.quota("any", 9) == Quota(9, 0.25)
    assert list(plan.named()) == []
    assert Threshold(0).quota("any", 9) == Quota(9, 0.0)


def test_threshold_by_layer() -> None:
    plan = Threshold({"conv": 0.25, "fc": 0})
    assert plan.quota("conv", 9) == Quota(9, 0.25)
    assert plan.quota("fc", 9) == Quota(9, 0.0)
    assert plan.quota("not named", 9) == Quota(0)
    assert list(plan.named()) == ["conv", "fc"]


@pytest.mark.parametrize("eps", [-1e-9, float("nan"), float("inf"), "small", None, True])
def test_what_is_no_threshold(eps: Any) -> None:
    with pytest.raises(InputError, match=r"Threshold for all layers: .* is not a number >= 0"):
        Threshold(eps)
    with pytest.raises(InputError, match=r"Threshold for fc: .* is not a number >= 0"):
        Threshold({"conv": 0.1, "fc": eps})


def test_plans_pass_through() -> None:
    for plan in (Share(0.5), Threshold(0.1)):
        assert as_plan(plan) is plan
    assert as_plan(0.5) == Share(0.5)
    assert as_plan({"fc": 2}) == Share({"fc": 2})


@pytest.mark.parametrize("size", [0, -1, 0.0, 1.01, float("nan"), float("inf"), "half", None, True, [0.5]])
def test_what_is_no_budget(size: Any) -> None:
    with pytest.raises(InputError, match=r"give a fraction of the separate networks .* or bytes"):
        Budget(size)


@pytest.mark.parametrize("size", [1, 0.01, 1.0, 10**9, np.int64(3), np.float32(0.5), Fraction(1, 2)])
def test_what_is_a_budget(size: Any) -> None:
    assert Budget(size).as_dict()["budget"] == size


@pytest.mark.parametrize("points", [-0.1, float("nan"), float("inf"), "few", None, True])
def test_what_are_no_points(points: Any) -> None:
    with pytest.raises(InputError, match=r"points=.* must be a number >= 0"):
        MaxDrop(points, {})


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([], {}, "data must be a dict"),
        ({"a": iter([])}, {}, "data of task 'a' is a list_iterator, but it is read many times"),
        ({"a": (x for x in [])}, {}, "data of task 'a' is a generator"),
        ({"a": 3}, {}, "data of task 'a' is a int"),
        ({}, {"metric": "accuracy"}, "metric 'accuracy' must be a function"),
        ({}, {"metric": {"a": 1}}, "metric 1 must be a function"),
        ({}, {"confidence": 1.0}, "confidence=1.0 must be None or a number from 0.5 to below 1"),
        ({}, {"confidence": "sure"}, "confidence='sure' must be"),
        ({}, {"evaluations": 1}, "evaluations=1 must be a whole number >= 2"),
        ({}, {"evaluations": 2.5}, "evaluations=2.5 must be a whole number >= 2"),
    ],
)
def test_what_is_no_max_drop(data: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        MaxDrop(1, data, **options)


def test_a_quota_over_parts() -> None:
    assert Quota(7, 0.5).divided([5, 5]) == [Quota(4, 0.5), Quota(3, 0.5)]
    for pairs in range(12):
        parts = Quota(pairs).divided([5, 1, 6])
        assert sum(part.pairs for part in parts) == pairs
        assert all(0 <= part.pairs <= units for part, units in zip(parts, (5, 1, 6), strict=True))
