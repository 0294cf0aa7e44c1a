"""Which of torch's functions give the same for the same arguments, and do nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, Literal

import torch

# Known by other names than those of their operators.
_PURE = {"interpolate", "normalize", "float", "half", "double", "local_response_norm", "grid_sample", "fold"}
_PURE |= {"softmin", "softsign", "tanhshrink"}
_PURE |= {"__getitem__", "__rsub__", "__rdiv__", "__rpow__", "__rmatmul__"}
# They change more of a tensor than what is counted.
EFFECTS = {"requires_grad_", "retain_grad", "detach_", "set_", "set_data", "resize_", "resize_as_"}
# Undetermined or random, though their operators are not marked so.
_IMPURE = {"empty_like", "new_empty", "new_empty_strided", "fractional_max_pool2d", "fractional_max_pool3d"}
_IMPURE |= EFFECTS
# It is in their arguments whether they are pure, or more has to be done about them.
_DEPENDING = {"scaled_dot_product_attention", "batch_norm", "instance_norm", "detach"}


@lru_cache(4096)
def purity(func: Callable[..., Any]) -> Literal["pure", "impure", "depends"]:
    """Whether a function gives the same for the same arguments and does no more, unless it is told to work in place.

    Of those for which it depends on the call, `is_pure` knows.
    """
    if not getattr(func, "_qualified_op_name", "aten::").startswith("aten::"):  # an operator that others wrote
        return "impure"
    name = getattr(func, "__name__", "")
    if name in _DEPENDING or works_in_place(name) or _is_random(name):
        return "depends"
    return "pure" if name in _PURE or _is_operator(name) else "impure"


def works_in_place(name: str) -> bool:
    """Whether a function of this name writes into its first argument."""
    return name[-1:] == "_" and name[-2:] != "__"


def is_pure(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """The same for one of torch's own functions, of this name, that is called like this."""
    if name == "scaled_dot_product_attention":
        return len(args) < 5 and kwargs.get("dropout_p", 0.0) == 0
    if name in ("batch_norm", "instance_norm"):  # with the statistics of the batch they write into the running ones
        running = kwargs.get("running_mean", args[1] if len(args) > 1 else None)
        return running is None or not kwargs.get("training", kwargs.get("use_input_stats", True))
    return name in _PURE or (_is_operator(name) and (not _is_random(name) or kwargs.get("training") is False))


@cache
def _is_operator(name: str) -> bool:
    return name not in _IMPURE and bool(_overloads(name))


@cache
def _is_random(name: str) -> bool:
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in _overloads(name))


def _overloads(name: str) -> list[Any]:
    found = getattr(torch.ops.aten, name, None) if name.isidentifier() and not name.startswith("__") else None
    return [] if found is None else [getattr(found, overload) for overload in found.overloads()]
