"""What is exported is compared with PyTorch: types, whole numbers exactly, one sample and many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import taskzip as tz
from taskzip.export.agreement import check, other_sizes
from taskzip.export.example import Example


class Giving(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def compared(right: Callable[[Tensor], Any], given: Callable[[Tensor], Any], *sizes: int) -> None:
    example = Example(torch.linspace(0.5, 2, 12).reshape(3, 4), ["a"], torch.device("cpu"))
    check({"a": Giving(right)}, example, sizes, lambda tensors: {"a": given(tensors["input"])})


@pytest.mark.parametrize(
    "right, given",
    [
        (lambda x: x, lambda x: x * (1 + 9e-5)),
        (lambda x: x - x, lambda x: x * 1e-7),
        (lambda x: (x * 1000).long(), lambda x: (x * 1000).long()),
        (lambda x: x > 1, lambda x: x > 1),
        (lambda x: x.half(), lambda x: (x.half().float() * (1 + 1e-3)).half()),
        (lambda x: x[:0], lambda x: x[:0]),
    ],
)
def test_the_same(right: Any, given: Any) -> None:
    compared(right, given, 1, 9)


@pytest.mark.parametrize(
    "right, given, message",
    [
        (lambda x: x, lambda x: x * (1 + 3e-4), "'a' differs from PyTorch's by 6.0e-04 .* largest value is 2.0e"),
        (lambda x: x * 0, lambda x: x * 1e-4, "differs"),
        (lambda x: (x * 1e6).long(), lambda x: (x * 1e6).long() + 1, "'a' has other values"),
        (lambda x: x > 1, lambda x: x > 1.1, "has other values"),
        (lambda x: x, lambda x: x * torch.nan, "differs from PyTorch's by nan"),
        (lambda x: x, lambda x: x.double(), "is of torch.float64 where it was exported, but of torch.float32 in"),
        (lambda x: x, lambda x: x[0], r"is \[4\] where it was exported, but \[3, 4\] in PyTorch"),
        (torch.rand_like, torch.rand_like, "'a' is another one each time that PyTorch computes it"),
        (lambda x: x, lambda x: x if len(x) == 3 else -x, "with batches of 1: 'a' differs"),
        (lambda x: x if len(x) < 9 else x[:0], lambda x: x, r"with batches of 9: 'a' is \[9, 4\]"),
        (lambda x: torch.complex(x, x), lambda x: torch.complex(x, -x), "differs from PyTorch's by 4.0e"),
    ],
)
def test_not_the_same(right: Any, given: Any, message: str) -> None:
    with pytest.raises(tz.ExportError, match=message) as found:
        compared(right, given, 1, 9)
    assert ".." not in str(found.value)


def test_sizes_that_pytorch_does_not_take_are_not_compared() -> None:
    compared(lambda x: (x - x.mean(0)) / x.std(0), lambda x: (x - x.mean(0)) / x.std(0), 1)
    compared(lambda x: x if len(x) > 2 else 1 // 0, lambda x: x, 1)


def test_sizes_that_are_tried() -> None:
    def sizes(x: Tensor, most: int | None = None) -> list[int]:
        return other_sizes(Example(x, ["a"], x.device), most)

    assert sizes(torch.randn(4, 2)) == [1, 12] and sizes(torch.randn(1, 2)) == [3]
    assert sizes(torch.randn(4, 2), 8) == [1, 8] and sizes(torch.randn(4, 2), 4) == [1]
    assert sizes(torch.tensor(1.0)) == []
