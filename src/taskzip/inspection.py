"""`inspect`: what taskzip understands of a network, before anything is zipped."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from taskzip.copying import check_kind, uncompiled
from taskzip.errors import InputError
from taskzip.flops import flops_per_sample
from taskzip.graph import Structure, analyse
from taskzip.observation import evaluating
from taskzip.task import call, input_tensors
from taskzip.zipped.sizes import bytes_together


@dataclass(frozen=True)
class Inspection(Structure):
    """The structure of a network, and what it takes.

    Attributes:
        flops: of one sample's forward pass; a multiply-add is two, as `torch.utils.flop_counter` counts.
        bytes: of parameters and buffers.
    """

    flops: int = 0
    bytes: int = 0

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.flops:,} FLOPs per sample (a multiply-add is 2), {self.bytes:,} bytes"


def inspect(model: nn.Module, example_input: Any) -> Inspection:
    """The layers of a network, which of them can be shared, and why the others cannot; its FLOPs and bytes. Print it.

    Args:
        model: the network; it is not changed.
        example_input: a tensor, a tuple `(inputs, targets)`, or a dict for `model(**example_input)`; the first axis of
            every tensor is the sample.

    Raises:
        GraphError: torch.export cannot follow the network.
        InputError: the network fails on the example.
    """
    check_kind(model, "")
    model = uncompiled(model)
    with evaluating(model):
        found = analyse(model, example_input, call)
    return Inspection(
        found.layers, found.spaces, found.axes, found.unreached, _flops(model, example_input), bytes_together(model)
    )


def _flops(model: nn.Module, example_input: Any) -> int:
    try:
        return flops_per_sample(model, example_input, partial(call, model))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # what torch.export sees are shapes, not values
        shapes = ", ".join(str(tuple(t.shape)) for t in input_tensors(example_input))
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{type(model).__name__} fails on inputs {shapes}: {reason}") from error
