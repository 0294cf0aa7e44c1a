"""Private weights follow the shared ones of their unit (design 2.5, point 3).

When the shared weights of a unit change by dS, its private weights may change too. The best that they can do is
dP = -H_pp^-1 H_ps dS, and what is left of the layer's error is quadratic in dS again, with the Schur complement
H_ss - H_sp H_pp^-1 H_ps in the place of H_ss: never more than with private weights that stay as they are.

In the curvatures here the first columns are the shared ones, the others are private.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from taskzip.algebra.curvature import whiten
from taskzip.algebra.factored import Factored
from taskzip.algebra.sparsity import fit, fit_on_support, solve_on_support


def schur_complement(h: Float[Tensor, "d d"] | Factored, shared: int) -> Float[Tensor, "s s"] | Factored:
    """The curvature over the shared columns, `shared` of them, when the private weights follow."""
    if isinstance(h, Factored):
        return _factored_complement(h, shared)
    pulled = whiten(h[shared:, shared:], h[shared:, :shared])
    return h[:shared, :shared] - pulled.mT @ pulled


def _factored_complement(h: Factored, shared: int) -> Factored:
    """U_s^T (I - U_p H_pp^-1 U_p^T) U_s + D_s; what the private weights can follow is taken off the rows.

    In the eigenvectors of U_p U_p^T, with D_p = delta I, each row keeps delta / (delta + its eigenvalue) of its square.
    """
    own, delta = h.rows[:, shared:], h.diagonal[shared]
    values, vectors = torch.linalg.eigh(own @ own.mT)
    values = torch.where(values > values[-1] * len(values) * torch.finfo(values.dtype).eps, values, 0)
    left = torch.where(values > 0, delta / (delta + values), 1)
    return Factored(left.sqrt()[:, None] * (vectors.mT @ h.rows[:, :shared]), h.diagonal[:shared])


def following(
    h: Float[Tensor, "d d"] | Factored,
    change: Float[Tensor, "units s"],
    exists: Bool[Tensor, "units p"] | None,
) -> Float[Tensor, "units p"]:
    """How the private weights change with the shared ones; connections that do not exist stay so (Sec. 3.6)."""
    shared = change.shape[1]
    if not isinstance(h, Factored):
        return solve_on_support(h[shared:, shared:], -(h[shared:, :shared] @ change.mT), exists).mT
    own = Factored(h.rows[:, shared:], h.diagonal[shared:])
    answers = -(h.rows[:, :shared] @ change.mT)
    prior = change.new_zeros(len(change), len(own))
    return fit(own, answers, prior) if exists is None else fit_on_support(own, answers, prior, exists)
