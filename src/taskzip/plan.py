"""How much to share: a fraction, a dict per layer, or up to which functional difference (N~_l, epsilon_l)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

from taskzip.errors import InputError


class Quota(NamedTuple):
    """What one layer may share: at most `pairs` pairs, each with d <= `threshold` where one is given."""

    pairs: int
    threshold: float | None = None


@dataclass(frozen=True)
class Threshold:
    """Share every pair whose functional difference d (eq. 12) is at most `eps`.

    Args:
        eps: one number for all layers, or a dict by layer name; a layer that the dict leaves out shares nothing.
    """

    eps: float | Mapping[str, float]

    def __post_init__(self) -> None:
        for where, eps in self.eps.items() if isinstance(self.eps, Mapping) else [("all layers", self.eps)]:
            if not _is_number(eps) or not eps >= 0:
                raise InputError(f"Threshold for {where}: {eps!r} is not a number >= 0.")

    def named(self) -> Iterable[str]:
        """The layers that are named one by one."""
        return self.eps.keys() if isinstance(self.eps, Mapping) else ()

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"threshold": _plain(self.eps)}

    def quota(self, layer: str, units: int) -> Quota:
        """What `layer`, with `units` pairs at most, may share."""
        eps = self.eps.get(layer) if isinstance(self.eps, Mapping) else self.eps
        return Quota(0) if eps is None else Quota(units, float(eps))


@dataclass(frozen=True)
class Share:
    """Share a fraction (float, 0 to 1) or a count (int) of a layer's units, in all layers or by layer name.

    The whole is the smaller of the two layers. A layer that a dict leaves out shares nothing.
    """

    amount: float | Mapping[str, float]

    def __post_init__(self) -> None:
        if isinstance(self.amount, Mapping):
            for layer, amount in self.amount.items():
                is_count = isinstance(amount, Integral) and not isinstance(amount, bool)
                if not _is_number(amount) or amount < 0 or (not is_count and amount > 1):
                    raise InputError(
                        f"share for layer {layer!r} is {amount!r}: give a fraction (float, 0 to 1) or a count (int)."
                    )
        elif not _is_number(self.amount) or not 0 <= self.amount <= 1:
            raise InputError(
                f"share is {self.amount!r}: give a fraction from 0 to 1, a dict by layer name, or a Threshold."
            )

    def named(self) -> Iterable[str]:
        """The layers that are named one by one."""
        return self.amount.keys() if isinstance(self.amount, Mapping) else ()

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"share": _plain(self.amount)}

    def quota(self, layer: str, units: int) -> Quota:
        """What `layer`, with `units` pairs at most, may share.

        Raises:
            InputError: a count above the number of units.
        """
        amount = self.amount.get(layer, 0) if isinstance(self.amount, Mapping) else float(self.amount)
        if not isinstance(amount, Integral):
            return Quota(round(amount * units))
        if amount > units:
            raise InputError(
                f"share for layer {layer!r} asks for {amount} shared units, but the smaller network has {units}."
            )
        return Quota(int(amount))


SharePlan = Share | Threshold


def as_plan(share: float | Mapping[str, float] | SharePlan) -> SharePlan:
    """Read the `share` argument of `zip`.

    Raises:
        InputError: anything that is not a fraction, a dict or a plan.
    """
    if isinstance(share, (Share, Threshold)):
        return share
    return Share(share)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _plain(amount: float | Mapping[str, float]) -> object:
    """Numbers as JSON knows them."""
    if isinstance(amount, Mapping):
        return {layer: _plain(each) for layer, each in amount.items()}
    return int(amount) if isinstance(amount, Integral) else float(amount)
