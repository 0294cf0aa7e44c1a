"""Random numbers that depend on a seed alone, and leave the caller's generator as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral

import torch

from taskzip.errors import InputError


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator, on which data loaders shuffle and dropout draws, and put it back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def checked_seed(seed: int) -> int:
    """The seed, if it is one.

    Raises:
        InputError: anything but a whole number >= 0.
    """
    if not isinstance(seed, Integral) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed={seed!r} must be a whole number >= 0.")
    return int(seed)
