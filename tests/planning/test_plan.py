from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from taskzip.errors import InputError, TaskzipWarning
from taskzip.planning.plan import Budget, MaxDrop, Quota, Share, Threshold, as_plan


def fraction(pairs: int) -> Quota:
    return Quota(pairs, in_proportion=True)


@pytest.mark.parametrize("amount", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("units", [1, 2, 7, 10, 300])
def test_a_fraction_of_the_units_of_every_layer(amount: float, units: int) -> None:
    assert Share(amount).quota("any", units) == fraction(round(amount * units))
    assert Share(0).quota("any", units) == Quota(0)


@pytest.mark.parametrize("one", [1, np.int64(1), np.uint8(1), Fraction(1)])
def test_one_for_all_layers_could_mean_two_things(one: Any) -> None:
    if isinstance(one, Fraction):
        assert Share(one).quota("fc", 8) == fraction(8)
        return
    with pytest.raises(
        InputError, match=r"share=.*1.* write share=1.0 for all units .* or share=\{\"\*\": 1\} for one"
    ):
        as_plan(one)


def test_one_unit_of_a_layer_is_said() -> None:
    assert Share({"fc": 1}).quota("fc", 8) == Quota(1)
    assert Share({"fc": 1.0}).quota("fc", 8) == fraction(8)
    for ones in ({"fc": 1}, {"conv": 0.5, "fc": np.int32(1)}, {"conv": 0, "fc": 1}):
        with pytest.warns(TaskzipWarning, match=r"share=\{'fc': 1\} shares one unit.* write 1.0 for all"):
            Share(ones).warn_of_ones()
    for counts in ({"conv": 3, "fc": 1}, {"fc": 1.0}, {"fc": 0}, {"fc": 1 / 16}, 1.0, {}):
        Share(counts).warn_of_ones()  # warnings are errors here


def test_globs() -> None:
    plan = Share({"encoder.*": 0.5, "encoder.1.*": 4, "*.out": 0.25, "encoder.1.out": 2, "h?": 9})
    assert plan.quota("encoder.0.fc", 8) == fraction(4)
    assert plan.quota("encoder.1.fc", 8) == Quota(4)  # the one with most letters
    assert plan.quota("encoder.1.out", 8) == Quota(2)  # the name itself
    assert plan.quota("encoder.0.out", 8) == fraction(4)
    assert plan.quota("decoder.out", 8) == fraction(2)
    assert plan.quota("h0", 8) == Quota(8)  # a count of a glob is at most the whole
    assert plan.quota("Encoder.0", 8) == Quota(0)
    assert Share({"a*": 1.0, "*a": 0.5}).quota("aa", 8) == fraction(4)  # of equals the last
    thresholds = Threshold({"encoder.*": 0.5, "encoder.0": 0})
    assert thresholds.quota("encoder.1", 8) == Quota(8, 0.5)
    assert thresholds.quota("encoder.0", 8) == Quota(8, 0.0)
    assert thresholds.quota("decoder", 8) == Quota(0)


def test_a_smaller_network_shares_in_proportion_less() -> None:
    assert [fraction(12).of(units, 24).pairs for units in (24, 16, 3)] == [12, 8, 2]
    assert Quota(12).of(16, 24) == Quota(12)


def test_counts_and_fractions_by_layer() -> None:
    plan = Share({"conv1": 3, "conv2": 0.5, "fc": 0})
    assert plan.quota("conv1", 20) == Quota(3)
    assert plan.quota("conv2", 50) == fraction(25)
    assert plan.quota("fc", 50) == Quota(0)
    assert plan.quota("not named", 50) == Quota(0)
    assert list(plan.named()) == ["conv1", "conv2", "fc"]
    assert list(Share(0.5).named()) == []


@pytest.mark.parametrize("amount", [np.float64(0.5), np.float32(0.5), Fraction(1, 2)])
def test_any_real_number_is_a_fraction(amount: Any) -> None:
    assert Share(amount).quota("fc", 8) == fraction(4)
    assert Share({"fc": amount}).quota("fc", 8) == fraction(4)


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


@pytest.mark.parametrize(("size", "meant"), [(1, "1.0"), (50, "0.5"), (100, "1.0"), (np.int64(63), "0.63")])
def test_a_budget_of_so_few_bytes_is_meant_otherwise(size: Any, meant: str) -> None:
    with pytest.raises(InputError, match=rf"no network is so small: write Budget\({meant}\) for a fraction"):
        Budget(size)


@pytest.mark.parametrize("size", [101, 0.01, 1.0, 10**9, np.int64(300), np.float32(0.5), Fraction(1, 2)])
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
