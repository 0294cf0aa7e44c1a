"""What a network's output holds: its tensors by name, however they are packed, and which of them are answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taskzip.tasks.task import has_numbers

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}
"""By dtype, how far answers may be apart by rounding, relative to the largest; 5e-2 for all others."""

_BESIDE = ("loss", "past_key_values", "hidden_states", "attentions")
"""How names end of what models of Hugging Face return beside their answers."""


def named_tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in an output: "name", or "name.0", "name.key", "name.key.0" and so on where it holds several.

    Looked into are mappings, tuples, lists, dataclasses, and the public attributes of other objects.
    """
    yield from _named(output, name, ())


def tensors(output: Any) -> list[Tensor]:
    """The tensors in an output, in order."""
    return [tensor for _, tensor in named_tensors(output)]


def answers(output: Any) -> dict[str, Tensor]:
    """The tensors of real or complex numbers that answer the input, by name; "" is the output itself.

    Where any is called logits, these only. A loss that the network computes by itself, numbers without an axis of
    samples, and what Hugging Face's models return for looking inside, are no answers.
    """
    found = {name: t for name, t in named_tensors(output) if t.is_floating_point() or t.is_complex()}
    logits = {name: t for name, t in found.items() if is_logits(name)}
    return logits or {name: t for name, t in found.items() if t.dim() and not name.split(".")[0].endswith(_BESIDE)}


def is_logits(name: str) -> bool:
    """Whether the name of a tensor in an output says that it holds class scores."""
    return "logits" in name.split(".")[0]


def own_loss(output: Any) -> Tensor | None:
    """The loss that a network has computed by itself, as Hugging Face's do when they are given labels."""
    loss = output.get("loss") if isinstance(output, Mapping) else None
    loss = loss if loss is not None or isinstance(output, Tensor) else getattr(output, "loss", None)
    return loss.mean() if isinstance(loss, Tensor) and loss.is_floating_point() else None


def _named(output: Any, name: str, inside: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield name, output
    elif id(output) not in inside:  # objects may refer to those that hold them
        for key, part in _parts(output):
            yield from _named(part, f"{name}.{key}" if name else str(key), (*inside, id(output)))


def _parts(output: Any) -> list[tuple[Any, Any]]:
    if isinstance(output, (type, nn.Module)):
        return []
    if is_dataclass(output):
        return [(field.name, getattr(output, field.name)) for field in fields(output)]
    if isinstance(output, Mapping) and output:
        return list(output.items())
    if isinstance(output, (tuple, list)):
        return list(zip(getattr(output, "_fields", range(len(output))), output, strict=True))
    return [(key, part) for key, part in getattr(output, "__dict__", {}).items() if not key.startswith("_")]


def same_outputs(wanted: Any, given: Any) -> bool:
    """Whether two outputs hold the same tensors, to rounding."""
    pairs = list(zip(tensors(wanted), tensors(given), strict=False))
    return len(tensors(wanted)) == len(tensors(given)) and all(_close(a, b) for a, b in pairs)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not has_numbers(a):
        return bool((a == b).all())
    apart = a != b  # equal infinities are equal
    if not apart.any():
        return True
    largest = a[a.isfinite()].abs().max() if a.isfinite().any() else a.new_zeros(()).abs()
    return bool((a - b)[apart].abs().max() <= ROUNDING.get(a.abs().dtype, 5e-2) * largest)
