"""Units that are to read only some of their inputs: the weights with which these come closest to what all of them gave.

With `zip(cross=False)` a shared unit loses its private inputs. Minimising 1/2 (w - v)^T H (w - v) over all v that are 0
in the private columns p gives v_s = H_ss^-1 H_s: w = w_s + H_ss^-1 H_sp w_p: what the private inputs gave is projected
onto the shared ones. What is left of the error no weights over shared inputs can take away, and what other weights u
add to it is 1/2 (u - v)_s^T H_ss (u - v)_s: units are compared (eq. 12) and merged (eq. 10, 11) at v and H_ss.

In the curvatures and weights here the first columns are those that stay.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from taskzip.algebra.curvature import solve_symmetric
from taskzip.algebra.factored import Factored, quadratic, restricted
from taskzip.algebra.sparsity import fit


def project(
    h: Float[Tensor, "d d"] | Factored, weights: Float[Tensor, "units d"], kept: int
) -> Float[Tensor, "units kept"]:
    """The weights over the first `kept` columns that raise the layer's error least; where none is lost, the same."""
    if kept == len(h):
        return weights
    own = restricted(h, slice(0, kept))
    if isinstance(own, Factored):
        assert isinstance(h, Factored)
        return fit(own, h.rows @ weights.mT, weights[:, :kept])
    assert isinstance(h, Tensor)
    return weights[:, :kept] + solve_symmetric(own, h[:kept, kept:] @ weights[:, kept:].mT).mT


def rise(
    h: Float[Tensor, "d d"] | Factored, weights: Float[Tensor, "units d"], kept: Float[Tensor, "units kept"]
) -> Float[Tensor, " units"]:
    """By how much the layer's error rises with these weights over the first columns, and none over the others."""
    lost = torch.cat([weights[:, : kept.shape[1]] - kept, weights[:, kept.shape[1] :]], dim=1)
    return quadratic(h, lost) / 2
