"""Whether an exported file gives what PyTorch gives."""

from __future__ import annotations

import torch
from torch import Tensor

from taskzip.errors import ExportError

TOLERANCE = 1e-4
"""How far the file's outputs may lie from PyTorch's, relative to the largest output of that name.

Numbers of half precision, of which one step is more than this, may be four steps away."""


def check_same(name: str, given: Tensor, right: Tensor) -> None:
    """Compare an output of the file with PyTorch's.

    Raises:
        ExportError: another shape, or a difference of more than `TOLERANCE`.
    """
    if given.shape != right.shape:
        raise ExportError(f"{name!r} is {list(given.shape)} in the exported file, but {list(right.shape)} in PyTorch.")
    half = right.dtype.is_floating_point and right.dtype.itemsize < 4
    tolerance = 4 * torch.finfo(right.dtype).eps if half else TOLERANCE
    given, right = given.double(), right.double()
    if right.numel() and not (given - right).abs().max() <= tolerance * right.abs().max():
        raise ExportError(
            f"{name!r} differs between the exported file and PyTorch by {(given - right).abs().max():.1e}, where the "
            f"largest value is {right.abs().max():.1e}: nothing was written."
        )
