"""Curvatures of few rows: H = U^T U + diag(D) with U [n, d] and n far below d, so that no d x d matrix is needed.

VGG-16's first linear layer reads 25,088 inputs, for which H would take 5 GB in float64; but 64 images are 64 rows of it
(design 2.6). Woodbury's identity would serve, but it subtracts large numbers that nearly agree. Instead everything is
rotated into an orthonormal basis that holds all rows: inside, curvatures are small matrices, for which the functions
serve that serve for any other; outside, they are D.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Factored:
    """The matrix U^T U + diag(D). It is scaled and added to others as a tensor is.

    Attributes:
        rows: U.
        diagonal: D, the damping, 0 where a connection is fictive: of few different values.
    """

    rows: Float[Tensor, "n d"]
    diagonal: Float[Tensor, " d"]

    def __len__(self) -> int:
        return len(self.diagonal)

    def __rmul__(self, factor: float) -> Factored:
        return Factored(factor**0.5 * self.rows, factor * self.diagonal)

    def __add__(self, other: Float[Tensor, "d d"] | Factored) -> Float[Tensor, "d d"] | Factored:
        """The sum; dense where the other one is, or where so many rows come together that this is smaller."""
        if isinstance(other, Tensor):
            return self.dense() + other
        total = Factored(torch.cat([self.rows, other.rows]), self.diagonal + other.diagonal)
        return total if len(total.rows) < len(total) else total.dense()

    __radd__ = __add__

    def damped(self, damping: float) -> Factored:
        """H + damping * mean(diag(H)) * I."""
        mean = (self.rows.square().sum(0) + self.diagonal).mean()
        return Factored(self.rows, self.diagonal + damping * mean)

    def restricted(self, columns: Int[Tensor, " c"] | slice) -> Factored:
        """H over some of its columns."""
        return Factored(self.rows[:, columns], self.diagonal[columns])

    def placed(self, places: Int[Tensor, " d"], width: int) -> Factored:
        """H as a part of a larger matrix, with its columns at these places and zeros elsewhere."""
        rows = self.rows.new_zeros(len(self.rows), width).index_copy(1, places, self.rows)
        return Factored(rows, self.diagonal.new_zeros(width).index_copy(0, places, self.diagonal))

    def dense(self) -> Float[Tensor, "d d"]:
        """The matrix itself."""
        h = self.rows.mT @ self.rows
        h.diagonal().add_(self.diagonal)
        return h


class Span:
    """Where factored curvatures are more than their D: an orthonormal basis Q [d, r] of the rows of all of them.

    Every D is constant on each vector of the basis, so that each curvature is Q K Q^T + (I - Q Q^T) diag(D).

    Attributes:
        curvatures: K [r, r] of each of them.
        diagonals: D [d] of each of them.
    """

    def __init__(self, curvatures: Sequence[Factored]) -> None:
        rows = torch.cat([h.rows for h in curvatures])
        self.diagonals = [h.diagonal for h in curvatures]
        _, kind = torch.unique(torch.stack(self.diagonals), dim=1, return_inverse=True)
        bases, columns = [], []
        for k in range(int(kind.max()) + 1):
            alike = torch.nonzero(kind == k)[:, 0]
            part = torch.linalg.qr(rows[:, alike].mT).Q
            bases.append(rows.new_zeros(len(kind), part.shape[1]).index_copy(0, alike, part))
            columns.append(alike[:1].expand(part.shape[1]))
        self._basis = torch.cat(bases, dim=1)
        self._columns = torch.cat(columns)  # one in which the vector of the basis lies
        self.curvatures = [Factored(self.inside(h.rows), self.inside_diagonal(h.diagonal)).dense() for h in curvatures]

    def times(self, counts: Sequence[float]) -> Span:
        """The span of the same curvatures, each of them times a factor."""
        other = copy(self)
        other.curvatures = [c * k for c, k in zip(counts, self.curvatures, strict=True)]
        other.diagonals = [c * d for c, d in zip(counts, self.diagonals, strict=True)]
        return other

    def inside(self, w: Float[Tensor, "units d"]) -> Float[Tensor, "units r"]:
        """The part of weights that lies in the span, in terms of the basis."""
        return w @ self._basis

    def inside_diagonal(self, diagonal: Float[Tensor, " d"]) -> Float[Tensor, " r"]:
        """What one of the Ds is on each vector of the basis."""
        return diagonal[self._columns]

    def with_inside(self, w: Float[Tensor, "units d"], inside: Float[Tensor, "units r"]) -> Float[Tensor, "units d"]:
        """The same weights with another part in the span."""
        return torch.addmm(w, inside - self.inside(w), self._basis.mT)


def span_of(curvatures: Sequence[Float[Tensor, "d d"] | Factored]) -> Span | None:
    """The span of curvatures, or None where one of them is dense."""
    factored = [h for h in curvatures if isinstance(h, Factored)]
    return Span(factored) if len(factored) == len(curvatures) else None


def dense(h: Float[Tensor, "d d"] | Factored) -> Float[Tensor, "d d"]:
    """A curvature as a matrix."""
    return h.dense() if isinstance(h, Factored) else h


def restricted(
    h: Float[Tensor, "d d"] | Factored, columns: Int[Tensor, " c"] | slice
) -> Float[Tensor, "c c"] | Factored:
    """A curvature over some of its columns."""
    if isinstance(h, Factored):
        return h.restricted(columns)
    return h[columns][:, columns]


def quadratic(h: Float[Tensor, "d d"] | Factored, w: Float[Tensor, "units d"]) -> Float[Tensor, " units"]:
    """w^T H w of every unit."""
    if isinstance(h, Factored):
        return (w @ h.rows.mT).square().sum(1) + w.square() @ h.diagonal
    return (w @ h * w).sum(1)
