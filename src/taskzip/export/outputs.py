"""What the outputs of the tasks are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def named_tensors(output: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in an output: "task", or "task.0", "task.key", "task.key.0" and so on where it holds several."""
    if isinstance(output, Tensor):
        yield name, output
        return
    parts: list[tuple[Any, Any]] = []
    if is_dataclass(output):
        parts = [(field.name, getattr(output, field.name)) for field in fields(output)]
    elif isinstance(output, Mapping):
        parts = list(output.items())
    elif isinstance(output, (tuple, list)):
        parts = list(zip(getattr(output, "_fields", range(len(output))), output, strict=True))
    for key, part in parts:
        yield from named_tensors(part, f"{name}.{key}")
