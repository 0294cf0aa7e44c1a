"""The options of `zip`, read and checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from taskzip.algebra import Connections, Matching
from taskzip.errors import InputError
from taskzip.observing import MaxRows
from taskzip.planning import Share, SharePlan, as_plan
from taskzip.randomness import checked_seed
from taskzip.training import Retraining
from taskzip.zipping.correspondence import Layers

Residual = Literal["coupled", "independent"]
Norms = Literal["private", "fold"]
Compensation = bool | Literal["output"]


@dataclass(frozen=True)
class Settings:
    """The options of `zip`, validated."""

    plan: SharePlan
    balance: tuple[float, ...]
    matching: Matching
    compensate: Compensation
    adapt: bool
    spread: bool
    own_scale: bool
    residual: Residual
    aligned: bool | None
    cross: bool
    connections: Connections
    batch_norm: Norms
    layers: Layers | None
    damping: float
    ridge: float | None
    max_rows: MaxRows
    retraining: Retraining
    seed: int

    @property
    def relative(self) -> bool:
        """Whether units get equal sizes and errors count relative to a layer's variance; the paper's do not."""
        return self.compensate is True and self.plan != Share(0.0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        steps = self.retraining.steps
        return {
            "share": self.plan.as_dict(),
            "balance": list(self.balance),
            "matching": self.matching,
            "compensate": self.compensate,
            "adapt": self.adapt,
            "spread": self.spread,
            "own_scale": self.own_scale,
            "residual": self.residual,
            "aligned": self.aligned,
            "cross": self.cross,
            "connections": self.connections,
            "batch_norm": self.batch_norm,
            "layers": _plain(self.layers),
            "damping": self.damping,
            "ridge": self.ridge,
            "max_rows": self.max_rows,
            "retrain": {k: int(n) for k, n in steps.items()} if isinstance(steps, Mapping) else int(steps),
            "seed": self.seed,
        }


def read_settings(
    names: Sequence[str],
    *,
    share: float | Mapping[str, float] | SharePlan,
    balance: float | Sequence[float] | Mapping[str, float] | None,
    matching: Matching,
    compensate: Compensation,
    adapt: bool | None,
    spread: bool | None,
    own_scale: bool | None,
    residual: Residual,
    aligned: bool | None,
    cross: bool,
    connections: Connections,
    batch_norm: Norms,
    layers: Layers | None,
    damping: float,
    ridge: float | None,
    max_rows: MaxRows,
    retrain: int | Mapping[str, int] | Retraining | None,
    seed: int,
) -> Settings:
    """Read the arguments of `zip` for tasks of these names.

    Raises:
        InputError: an argument that cannot be used.
    """
    return Settings(
        as_plan(share),
        _balance(names, balance),
        _one_of("matching", matching, ("optimal", "greedy", "random")),
        _one_of("compensate", compensate, (True, False, "output")),
        compensate is True if _one_of("adapt", adapt, (None, True, False)) is None else bool(adapt),
        compensate is True if _one_of("spread", spread, (None, True, False)) is None else bool(spread),
        _own_scale(own_scale, compensate, cross, batch_norm),
        _one_of("residual", residual, ("coupled", "independent")),
        _aligned(aligned, cross),
        bool(_one_of("cross", cross, (True, False))),
        _one_of("connections", connections, ("denser", "any")),
        _one_of("batch_norm", batch_norm, ("private", "fold")),
        layers if isinstance(layers, Mapping) else _one_of("layers", layers, (None, "order", "name")),
        _not_negative("damping", damping),
        None if ridge is None else _not_negative("ridge", ridge),
        _max_rows(max_rows),
        retrain if isinstance(retrain, Retraining) else Retraining(0 if retrain is None else retrain),
        checked_seed(seed),
    )


def settings_alone(
    *,
    max_rows: MaxRows,
    seed: int,
    damping: float = 1e-2,
    ridge: float | None = None,
    retrain: int | Retraining | None = None,
) -> Settings:
    """Those of one network by itself, which shares nothing and is compensated in full.

    Raises:
        InputError: an argument that cannot be used.
    """
    return read_settings(
        [""],
        share=0.0,
        balance=None,
        matching="optimal",
        compensate=True,
        adapt=None,
        spread=None,
        own_scale=None,
        residual="coupled",
        aligned=None,
        cross=True,
        connections="denser",
        batch_norm="private",
        layers=None,
        damping=damping,
        ridge=ridge,
        max_rows=max_rows,
        retrain=retrain,
        seed=seed,
    )


def _plain(layers: object) -> object:
    """A correspondence as JSON knows it."""
    return {k: _plain(v) for k, v in layers.items()} if isinstance(layers, Mapping) else layers


def _balance(names: Sequence[str], balance: float | Sequence[float] | Mapping[str, float] | None) -> tuple[float, ...]:
    if balance is None:
        return (1 / max(len(names), 1),) * len(names)
    if isinstance(balance, Mapping):
        if set(balance) != set(names):
            raise InputError(
                f"balance must name every task once: it names {list(balance)}, the tasks are {list(names)}."
            )
        balance = [balance[name] for name in names]
    try:
        weights = [float(b) for b in (balance if isinstance(balance, Iterable) else [balance, 1 - balance])]
    except (TypeError, ValueError) as error:
        raise InputError(f"balance {balance!r} must be a number, numbers in order, or a dict by task name.") from error
    if len(weights) != len(names) or not all(0 < b < 1 for b in weights) or abs(sum(weights) - 1) > 1e-6:
        raise InputError(f"balance {weights} must give each of the {len(names)} tasks a weight above 0, summing to 1.")
    return tuple(weights)


def _own_scale(own_scale: bool | None, compensate: Compensation, cross: bool, batch_norm: Norms) -> bool:
    if _one_of("own_scale", own_scale, (None, True, False)) is None:
        return compensate is True and bool(cross) and batch_norm != "fold"
    if own_scale and not cross:
        raise InputError(
            "own_scale=True gives shared units another scale in every task, with cross=False they are a network of "
            "their own that all tasks have in common: leave one of them away."
        )
    return bool(own_scale)


def _aligned(aligned: bool | None, cross: bool) -> bool | None:
    if _one_of("aligned", aligned, (None, True, False)) and cross is False:
        raise InputError(
            "aligned=True lets shared units read inputs that the tasks do not share, cross=False forbids it: leave one "
            "of them away."
        )
    return aligned


def _one_of(name: str, value: Any, known: Sequence[Any]) -> Any:
    if value not in known:
        raise InputError(f"{name}={value!r} is not known: choose one of {', '.join(map(repr, known))}.")
    return value


def _not_negative(name: str, value: float) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise InputError(f"{name}={value!r} must be a number >= 0.")
    return float(value)


def _max_rows(value: MaxRows) -> MaxRows:
    if value is None or value == "auto":
        return value
    if isinstance(value, Integral) and not isinstance(value, bool) and value > 0:
        return int(value)
    raise InputError(f"max_rows={value!r} must be a positive number of rows, 'auto', or None for every row.")
