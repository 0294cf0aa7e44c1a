"""Which functions may be computed once for several networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from taskzip.zipped.purity import is_pure, purity, works_in_place


@pytest.mark.parametrize(
    "func", [F.relu, torch.conv2d, F.linear, torch.Tensor.flatten, F.interpolate, torch.ops.aten.relu, F.grid_sample]
)
def test_pure(func: Callable[..., Any]) -> None:
    assert purity(func) == "pure"


@pytest.mark.parametrize(
    "func", [F.dropout, torch.rand_like, F.batch_norm, F.relu_, torch.Tensor.add_, torch.Tensor.detach, torch.bernoulli]
)
def test_it_depends_on_the_call_or_is_never_so(func: Callable[..., Any]) -> None:
    assert purity(func) == "depends"


@pytest.mark.parametrize(
    "func", [torch.empty_like, torch.Tensor.numpy, torch.Tensor.shape.__get__, F.fractional_max_pool2d]
)
def test_impure_or_unknown(func: Callable[..., Any]) -> None:
    assert purity(func) == "impure"


def test_operators_that_others_wrote() -> None:
    library = torch.library.Library("taskzip_purity", "FRAGMENT")
    library.define("relu(Tensor x) -> Tensor")
    assert purity(torch.ops.taskzip_purity.relu) == "impure"


def test_calls() -> None:
    assert is_pure("dropout", (None,), {"training": False}) and not is_pure("dropout", (None,), {"training": True})
    assert not is_pure("rand_like", (None,), {})
    assert is_pure("batch_norm", (None, 1, 1), {"training": False})
    assert not is_pure("batch_norm", (None, 1, 1), {"training": True})
    assert is_pure("batch_norm", (None, None, None), {"training": True})
    assert not is_pure("scaled_dot_product_attention", (), {"dropout_p": 0.1})
    assert works_in_place("add_") and not works_in_place("__add__") and not works_in_place("add")
