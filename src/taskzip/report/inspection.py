"""`inspect`: what taskzip understands of a network, before anything is zipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import groupby
from typing import Any, overload

import torch
from torch import nn

from taskzip.copying import check_kind, uncompiled
from taskzip.errors import InputError
from taskzip.graph import Forward, Rest, Structure, analyse, table
from taskzip.report.comparison import Comparison, compare
from taskzip.tasks import Task, call, evaluating, input_tensors
from taskzip.zipped import bytes_together, flops_per_sample


@dataclass(frozen=True)
class Inspection(Structure):
    """The structure of a network, and what it takes.

    Attributes:
        flops: of one sample's forward pass; a multiply-add is two, as `torch.utils.flop_counter` counts.
        bytes: of parameters and buffers.
        parameters: how many numbers these are.
    """

    flops: int = 0
    bytes: int = 0

    parameters: int = 0

    def __str__(self) -> str:
        return "\n".join(
            [
                super().__str__(),
                *_rest_table(self.rest),
                self._possible(),
                f"{self.flops:,} FLOPs per sample (a multiply-add is 2), {self.bytes:,} bytes",
            ]
        )

    def shareable(self) -> tuple[int, int]:
        """How many rows of layers, and parameters in them, it can at most share with a network of its own kind."""
        rows = parameters = 0
        for layer in self.layers:
            free = sum(part.size for part in self.parts(layer).values())
            rows += free
            parameters += free * (layer.inputs * layer.taps + (layer.bias is not None))
        return rows, parameters

    def _possible(self) -> str:
        rows, parameters = self.shareable()
        of = sum(layer.units for layer in self.layers)
        return (
            f"can be shared with a network of its own kind: {_part(rows, of)} rows, "
            f"{_part(parameters, self.parameters)} parameters"
        )


def _part(some: int, whole: int) -> str:
    return f"{some:,} of {whole:,}" + (f" ({some / whole:.0%})" if whole else "")


def _rest_table(rest: Sequence[Rest]) -> list[str]:
    """The parameters that are not in layers; those of one module of which the same is to be said stand together."""
    if not rest:
        return []
    rows = [("other parameters", "shape", "what becomes of them")]
    for (_, said), some in groupby(rest, lambda each: (each.name.rpartition(".")[0], each.said)):
        each = list(some)
        shapes = dict.fromkeys("x".join(map(str, one.shape)) or "scalar" for one in each)
        rows.append((", ".join(one.name for one in each), ", ".join(shapes), said))
    return ["", table(rows, {0: 44, 1: 14, 2: 34}), ""]


@overload
def inspect(model: nn.Module, example_input: Any, *, forward: Forward | None = None) -> Inspection: ...


@overload
def inspect(model: Sequence[Task]) -> Comparison: ...


def inspect(
    model: nn.Module | Sequence[Task], example_input: Any = None, *, forward: Forward | None = None
) -> Inspection | Comparison:
    """The layers of a network, which of them can be shared, and why the others cannot; its FLOPs and bytes. Print it.

    A line of the first table is a layer's weight and bias, one of the second any other parameters.
    Of a list of tasks: which of their layers `zip` puts together.

    Args:
        model: the network; it is not changed. Or a list of tasks, without an example.
        example_input: a tensor, a tuple `(inputs, targets)`, or a dict for `model(**example_input)`; the first axis of
            every tensor is the sample.
        forward: `forward(model, example_input)` if the network is called in another way, as in `Task`.

    Raises:
        GraphError: torch.export cannot follow the network.
        InputError: the network fails on the example.
    """
    if not isinstance(model, nn.Module):
        return compare(model)
    check_kind(model, "")
    model = uncompiled(model)
    with evaluating(model):
        found = analyse(model, example_input, partial(call, forward=forward))
    return Inspection(
        **{each.name: getattr(found, each.name) for each in fields(found)},
        flops=_flops(model, example_input, forward),
        bytes=bytes_together(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _flops(model: nn.Module, example_input: Any, forward: Forward | None) -> int:
    try:
        return flops_per_sample(model, example_input, partial(call, model, forward=forward))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # what torch.export sees are shapes, not values
        shapes = ", ".join(str(tuple(t.shape)) for t in input_tensors(example_input))
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{type(model).__name__} fails on inputs {shapes}: {reason}") from error
