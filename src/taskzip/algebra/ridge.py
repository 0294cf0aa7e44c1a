"""How far compensation holds on to the present weights: chosen by rows of the calibration data that are held out.

A ridge that is too strong pulls towards weights that were made for other inputs; one that is too weak fits noise, and
makes large weights that cancel each other and retrain badly. Of ridges that serve the held-out rows about equally well
the strongest is taken.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from taskzip.algebra.curvature import LayerStatistics
from taskzip.algebra.guard import layer_errors
from taskzip.algebra.recalibration import least_squares

RIDGES = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)
"""What is tried, strongest first."""

DEFAULT = 0.1
"""Where there are too few samples to hold any out."""

_EQUAL = 0.02
"""Errors that differ by less than this part of the smallest are about equal."""

_UNITS = 32
"""So many units of a layer are asked, spread evenly over it."""


def choose_ridge(
    statistics: LayerStatistics, weights: Float[Tensor, "units d1"], *, bias: bool, pruned: bool = True
) -> float:
    """The ridge for `least_squares` over all rows of `statistics`, some of which were held out.

    Solved without these rows, units must come closest to the original network's pre-activations on them, relative to
    the spread of each unit there.
    """
    if statistics.parts is None:
        return DEFAULT
    fit, held = statistics.parts
    units = _some(len(weights))
    fit, present = fit.of_units(units), weights[units]
    variance = held.answer_moments()[1][units]
    alive = variance > 0
    errors: list[float] = []
    for ridge in RIDGES:
        solved = least_squares(fit, present, ridge, bias=bias, pruned=pruned)
        errors.append(float((layer_errors(held, solved, units) / variance)[alive].sum()))
        if errors[-1] > (1 + _EQUAL) * min(errors):
            break  # weaker ones fit more noise still
    return next(ridge for ridge, error in zip(RIDGES, errors, strict=False) if error <= (1 + _EQUAL) * min(errors))


def _some(units: int) -> Tensor:
    return torch.arange(units)[:: max(1, units // _UNITS)][:_UNITS]
