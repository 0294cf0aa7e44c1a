"""Single-precision copies of half-precision parameters, on which small steps add up instead of being rounded away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)
_SCALE = 2.0**10
"""By which losses are multiplied at first, lest gradients vanish in float16."""


class Masters:
    """What an optimizer moves in place of the parameters of a network (Micikevicius et al., 2018, arXiv:1710.03740).

    Attributes:
        parameters: to optimize: copies of those in half precision, and all others themselves.
        copies: those of them that are copies.
        scale: by which to multiply a loss before `backward`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._of = {p: nn.Parameter(p.detach().float()) if p.dtype in _HALF else p for p in parameters}
        self.parameters = list(self._of.values())
        self.copies = [master for p, master in self._of.items() if master is not p]
        self.scale = _SCALE if any(p.dtype == torch.float16 for p in parameters) else 1.0

    def of(self, parameter: nn.Parameter) -> Tensor:
        """What stands for a parameter."""
        return self._of[parameter]

    def forget_gradients(self) -> None:
        """Of the parameters and their copies."""
        for parameter in (*self._of, *self.copies):
            parameter.grad = None

    def take_gradients(self) -> bool:
        """Hand the gradients on, or lower the scale and return False where they were too large for float16."""
        scaled = {p: p.grad for p in self._of if p.grad is not None}
        if self.scale > 1 and not all(bool(gradient.isfinite().all()) for gradient in scaled.values()):
            self.scale /= 2
            return False
        for parameter, gradient in scaled.items():
            master = self._of[parameter]
            master.grad = gradient.to(master.dtype) / self.scale if self.scale != 1 else gradient.to(master.dtype)
        return True

    @torch.no_grad()
    def give_values(self) -> None:
        """Round what was optimized into the network."""
        for parameter, master in self._of.items():
            if master is not parameter:
                parameter.copy_(master)


@contextmanager
def without_cached_casts() -> Iterator[None]:
    """Let `torch.autocast` around a loop of training read the weights anew at every step."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
