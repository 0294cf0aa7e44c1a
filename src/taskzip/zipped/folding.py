"""Batch-norm folded into the layer before it or those behind it: nothing private is left where these are shared.

Directly behind a layer it scales and shifts what the layer answers. Elsewhere, such as behind an activation, what reads
it may take it over: W (s x + t) + b = (W s) x + (b + W t), as long as nothing but layers read it, and nothing stands
between that answers differently when scale and shift come later. A padded convolution does: its zeros are not shifted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from taskzip.graph import Layer, NormReaders, Structure

Folded = list[tuple[str, str]]
"""Paths of the layers and of the batch-norms that were folded into them; one may be in several layers behind it."""

_FORWARDS = {nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}


@dataclass(frozen=True)
class Fold:
    """A batch-norm that becomes part of a layer.

    Attributes:
        layer, norm: their paths.
        channels: of a layer behind it, per input the channel that it reads, -1 for none; None for the layer before it.
    """

    layer: str
    norm: str
    channels: np.ndarray | None = None


def foldable(network: nn.Module, structure: Structure) -> tuple[list[Fold], dict[str, str]]:
    """Which batch-norms can be folded; and of the others, by their paths, why they cannot."""
    folds = [Fold(layer, norm) for layer, norm in _behind_layers(network, structure.layers)]
    gone = {each.norm for each in folds}
    private = {}
    for norm in structure.norms:
        if norm.name in gone:
            continue
        obstacle = norm.obstacle or _obstacle(network, norm)
        if obstacle:
            private[norm.name] = obstacle
        else:
            folds += [Fold(reader.layer, norm.name, reader.channels) for reader in norm.readers]
    return folds, private


def listed(private: Mapping[str, str]) -> str:
    """Batch-norms that stay private, by the reasons, for a person."""
    by_reason: dict[str, list[str]] = {}
    for norm, reason in private.items():
        by_reason.setdefault(reason, []).append(norm)
    return "; ".join(f"{_some(norms)} ({reason})" for reason, norms in by_reason.items())


def _some(names: Sequence[str], most: int = 3) -> str:
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return " and ".join([", ".join(names[:most]), *more])


def _behind_layers(network: nn.Module, layers: Iterable[Layer]) -> Folded:
    """Torch's own batch-norms directly behind a linear layer or a convolution of torch."""
    found = []
    for layer in layers:
        if layer.batch_norm is None or not layer.weight.endswith("weight"):
            continue
        path, norm = (name.rpartition(".")[0] for name in (layer.weight, layer.batch_norm.mean))
        # A subclass may do more in its forward.
        if can_fold(network, path, norm) and type(network.get_submodule(norm)).forward is _BatchNorm.forward:
            found.append((path, norm))
    return found


def _obstacle(network: nn.Module, norm: NormReaders) -> str:
    """Why the layers behind a batch-norm cannot take it over, for all that the graph says that they could, or ""."""
    names = [name for name, _ in network.named_modules(remove_duplicate=False)]
    module = network.get_submodule(norm.name) if norm.name in names else None
    if not isinstance(module, _BatchNorm) or type(module).forward is not _BatchNorm.forward or _has_hooks(module):
        return "which does more than torch's own"
    if sum(each is module for _, each in network.named_modules(remove_duplicate=False)) > 1:
        return "which has several names"
    for reader in norm.readers:
        layer = network.get_submodule(reader.layer)
        if not can_fold(network, reader.layer, norm.name) or type(layer).forward not in _FORWARDS:
            return f"read by {reader.layer}, which does more than a layer of torch"
    scale, shift = _scale_and_shift(module)
    if norm.positive and (scale < 0).any():
        return f"{norm.positive}, while some of its scales are negative"
    return f"{norm.no_shift}, while it adds a shift" if norm.no_shift and shift.any() else ""


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def can_fold(network: nn.Module, path: str, norm: str) -> bool:
    """Whether there is a layer of torch and a module for its batch-norm at these paths."""
    modules = dict(network.named_modules())
    return norm in modules and isinstance(modules.get(path), (nn.Linear, _ConvNd))


def fold(network: nn.Module, folds: Sequence[Fold]) -> None:
    """Give every layer the weights that it has with its batch-norm, in place; the batch-norm becomes an identity."""
    for each in folds:
        layer, norm = _layer(network, each.layer), network.get_submodule(each.norm)
        assert isinstance(norm, _BatchNorm)
        with torch.no_grad():
            scale, shift = _scale_and_shift(norm)
            bias = layer.weight.new_zeros(len(layer.weight), dtype=torch.float64)
            bias = bias if layer.bias is None else layer.bias.double()
            if each.channels is None:
                weight, bias = layer.weight.double() * _upright(scale, layer.weight), bias * scale + shift
            else:
                weight, bias = _taken_over(layer, bias, scale, shift, each.channels)
            layer.weight.copy_(weight)
            layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    forget_batch_norms(network, [(each.layer, each.norm) for each in folds])


def _scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """What a batch-norm multiplies by and then adds, float64 [channels]."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        return scale, shift if norm.bias is None else shift + norm.bias.double()


def _taken_over(
    layer: nn.Linear | _ConvNd, bias: Tensor, scale: Tensor, shift: Tensor, channels: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Weights and bias of a layer that reads s x + t at some of its inputs, as if it read x there, float64."""
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    weight = layer.weight.double().unflatten(0, (groups, -1))  # [groups, rows of a group, inputs of a group, *kernel]
    index = torch.from_numpy(channels).to(weight.device)
    of_inputs = [
        torch.where(index < 0, none, each[index.clamp_min(0)]).unflatten(0, (groups, 1, -1))
        for each, none in ((scale, 1.0), (shift, 0.0))
    ]
    scales, shifts = (each.reshape(*each.shape, *[1] * (weight.dim() - 3)) for each in of_inputs)
    return (weight * scales).flatten(0, 1), bias + (weight * shifts).flatten(0, 1).flatten(1).sum(1)


def _upright(scale: Tensor, weight: Tensor) -> Tensor:
    """One number per row of a weight."""
    return scale.reshape(-1, *[1] * (weight.dim() - 1))


def _layer(network: nn.Module, path: str) -> nn.Linear | _ConvNd:
    layer = network.get_submodule(path)
    assert isinstance(layer, (nn.Linear, _ConvNd))
    return layer


def forget_batch_norms(network: nn.Module, folded: Sequence[tuple[str, str]]) -> None:
    """Only the shape of what `fold` does: biases, with any values, and identities."""
    for path, norm in folded:
        layer = _layer(network, path)
        if layer.bias is None:
            weight = layer.weight
            layer.bias = nn.Parameter(weight.new_zeros(len(weight)), requires_grad=weight.requires_grad)
        network.set_submodule(norm, nn.Identity())
