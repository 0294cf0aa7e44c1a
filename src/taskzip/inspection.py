"""`inspect`: what taskzip understands of a network, before anything is zipped."""

from __future__ import annotations

from typing import Any

from torch import nn

from taskzip.graph import Structure, analyse
from taskzip.observation import evaluating
from taskzip.task import call


def inspect(model: nn.Module, example_input: Any) -> Structure:
    """The layers of a network, which of them can be shared, and why the others cannot. Print it.

    Args:
        model: the network; it is not changed.
        example_input: a tensor, a tuple `(inputs, targets)`, or a dict for `model(**example_input)`.

    Raises:
        GraphError: torch.export cannot follow the network.
    """
    with evaluating(model):
        return analyse(model, example_input, call)
