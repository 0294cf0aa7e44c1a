"""What tasks read: names, batches and copies of the tensors of an example."""

from __future__ import annotations

from collections import UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

import taskzip as tz
from taskzip.export.example import Example

Two = namedtuple("Two", ["x", "y"])
CPU = torch.device("cpu")
X, Y = torch.randn(3, 4), torch.randn(3)


@pytest.mark.parametrize(
    "example, names",
    [
        (X, ["input"]),
        ((X, 2, Y), ["input.0", "input.2"]),
        ([X, {"y": Y, "z": None}], ["input.0", "input.1.y"]),
        ((X, [Y, (Y, Y)]), ["input.0", "input.1.0", "input.1.1.0", "input.1.1.1"]),
        ({"x": X, "more": [Y, Y]}, ["x", "more.0", "more.1"]),
        (UserDict(x=X), ["x"]),
        ((Two(X, Y),), ["input.0.x", "input.0.y"]),
        ({"a": X, "b": (X, Y)}, ["input.a", "input.b.0", "input.b.1"]),
        ({"a": X, "b": {"x": [X]}, "c": Y}, ["input.a", "input.b.x.0"]),
    ],
)
def test_names(example: Any, names: list[str]) -> None:
    found = Example(example, ["a", "b"], CPU)
    assert list(found.tensors) == names
    others = {name: tensor + 1 for name, tensor in found.tensors.items()}
    calls = found.calls(others)
    given = example if names[0] == "input.a" else {"a": example, "b": example}
    for task, (args, kwargs) in calls.items():
        wanted = given[task]
        if isinstance(wanted, (dict, UserDict)):
            assert args == () and set(kwargs) == set(wanted)
        else:
            assert kwargs == {} and len(args) == (len(wanted) if isinstance(wanted, (tuple, list)) else 1)


def test_every_task_gets_copies_inside_of_the_arguments_as_they_were() -> None:
    example = Example((X, [Y, "mean", {"y": Y}]), ["a", "b"], CPU)
    (a, _), (b, _) = example.calls(example.tensors).values()
    assert type(a[1]) is list and a[1][1] == "mean" and list(a[1][2]) == ["y"]
    a[0].zero_()
    a[1][2]["y"].zero_()
    assert torch.equal(b[0], X) and torch.equal(b[1][2]["y"], Y) and torch.equal(a[1][0], Y)
    assert X.abs().sum() > 0 and Y.abs().sum() > 0


def test_samples() -> None:
    example = Example({"a": X, "b": (torch.tensor(2.0), X[:2])}, ["a", "b"], CPU)
    assert example.samples == 3 and example.batches == {"input.a": "batch_a", "input.b.1": "batch_b"}
    resized = example.resized(5)
    assert torch.equal(resized["input.a"], X[[0, 1, 2, 0, 1]])
    assert torch.equal(resized["input.b.1"], X[[0, 1, 0, 1, 0]]) and resized["input.b.0"] == 2


@pytest.mark.parametrize(
    "example, message",
    [
        ((X, [np.ones(3)]), r"input\.1\.0 is an array of NumPy, .* give a tensor"),
        (({"a.b": X, "a": {"b": Y}},), r"input\.0\.a\.b would be the name of two tensors"),
        ({"a": X}, "example has inputs for a, but the tasks are a, b"),
        (["x", [1, 2]], "example is a list without a tensor"),
        ({"a": X, "b": 3}, "example for task 'b' is a int without a tensor"),
        ((torch.randn(0, 3),), r"example is empty: input\.0 has no sample"),
    ],
)
def test_what_cannot_be_read(example: Any, message: str) -> None:
    with pytest.raises(tz.InputError, match=message):
        Example(example, ["a", "b"], CPU)
