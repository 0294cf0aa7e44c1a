"""How much errors of a layer's answers matter to what the network puts out, without labels.

Of outputs y = f(z) of a layer's answers z, a small error dz changes y by J dz. With random v, of mean square 1 over the
outputs' variance and number, (v^T J dz)^2 is in the mean the square of that change, relative to the outputs' variance;
and v^T J is what one backward pass gives. Its second moments are the metric of the layer's answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from taskzip.errors import InputError
from taskzip.graph import Layer
from taskzip.observing.layer_calls import Call, LayerCalls
from taskzip.observing.rows import by_channel
from taskzip.tasks import Batch, Task, has_numbers, in_eval_mode, run_batch, samples_in, tensors

_SAMPLES = 512
"""So many samples are looked at."""


class Sensitivity(NamedTuple):
    """The metric of one layer.

    Attributes:
        metric: [units, units], mean of g g^T over rows, g being what an output's random sum changes by.
        rows: per sample, how many rows there are: errors of all of them add up.
    """

    metric: Tensor
    rows: float


def sensitivities(task: Task, network: nn.Module, layers: Sequence[Layer], seed: int) -> dict[str, Sensitivity]:
    """The metric of each layer's answers; none for a layer on which no output depends."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    samples = 0
    with in_eval_mode(network), torch.enable_grad():
        for index, batch in enumerate(task.batches()):
            generator = torch.Generator().manual_seed(seed + index)
            for name, found in _gradients(task, network, layers, batch, index, generator).items():
                for g in found:
                    sums[name] = sums.get(name, 0) + g.mT @ g
                    rows[name] = rows.get(name, 0) + len(g)
            samples += samples_in(batch)
            if samples >= _SAMPLES:
                break
    return {name: Sensitivity((total / rows[name]).double(), rows[name] / samples) for name, total in sums.items()}


def _gradients(
    task: Task, network: nn.Module, layers: Sequence[Layer], batch: Batch, index: int, generator: torch.Generator
) -> Mapping[str, Sequence[Tensor]]:
    """Per layer, call by call, how a random sum of a sample's outputs changes with its answers: [rows, units]."""
    weights = {id(network.get_parameter(layer.weight)): layer for layer in layers}
    seen: list[tuple[Layer, Tensor]] = []

    def take(call: Call) -> Tensor:
        z = call()
        layer = weights.get(id(call.given["weight"]))
        if layer is None:
            return z
        z = z if z.requires_grad else z.detach().requires_grad_()
        seen.append((layer, z))
        return z.clone()  # what follows may write into it

    with LayerCalls(take):
        outputs = [y for y in tensors(run_batch(task, network, batch, index)) if has_numbers(y) and y.requires_grad]
    if not outputs or not seen:
        return {}
    sizes = [_size(y.detach()[y.isfinite()]) for y in outputs]
    outputs = [torch.where(y.isfinite(), y, 0) for y in outputs]  # what was masked has infinite scores
    drawn = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    per_sample = sum(y.numel() for y in outputs) / samples_in(batch)
    scaled = [v / (size * per_sample**0.5) for v, size in zip(drawn, sizes, strict=True)]
    total = sum((v * y).sum() for v, y in zip(scaled, outputs, strict=True))
    found: dict[str, list[Tensor]] = {}
    try:
        gradients = torch.autograd.grad(total, [z for _, z in seen], allow_unused=True)
    except RuntimeError as error:
        raise InputError(
            f"task {task.name!r}: no gradient of its outputs can be had, by which errors of layers are weighed: "
            f"{str(error).splitlines()[0]}"
        ) from error
    for (layer, _), g in zip(seen, gradients, strict=True):
        if g is not None:
            rows = by_channel(g, layer).flatten(0, -2)
            found.setdefault(layer.name, []).append(rows[rows.isfinite().all(1)])
    return {name: each for name, each in found.items() if sum(map(len, each))}


def _size(outputs: Tensor) -> Tensor:
    """What errors of outputs are relative to: how much these vary, or else how large they are."""
    if not outputs.any():
        return torch.ones_like(outputs.abs().sum())
    spread = outputs.std(correction=0)
    return spread if spread > 0 else outputs.abs().mean()
