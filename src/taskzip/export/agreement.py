"""Whether what was exported gives what PyTorch gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from taskzip.errors import ExportError, TaskzipError
from taskzip.export.example import Example, Sizes
from taskzip.export.joint import outputs

TOLERANCE = 1e-4
"""How far outputs may lie from PyTorch's, relative to the largest output of that name.

Numbers of half precision, of which one step is more than this, may be four steps away. Whole numbers are the same."""

_ROUNDING = 1e-6
"""How far in any case: that of sums which should be 0."""


def other_sizes(example: Example, largest: int | None = None) -> list[int]:
    """Of batches that are to be tried, too: a single sample, which torch takes for special, and many."""
    return sorted({1, largest or 3 * example.samples} - {example.samples}) if example.batches else []


def check(
    networks: Mapping[str, nn.Module],
    example: Example,
    sizes: Iterable[int | Sizes],
    run: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
) -> None:
    """Run what was exported on the example, and on what has other sizes, and compare.

    Args:
        networks: by task.
        example: of what they read.
        sizes: of batches or axes, besides the example's own.
        run: gives the outputs of what was exported, by name, from the tensors of the example by name.

    Raises:
        ExportError: another type or shape, or a difference of more than `TOLERANCE`.
    """
    for other in (None, *sizes):
        tensors = example.tensors if other is None else example.resized(other)
        try:
            wanted = _by_name(networks, example, tensors)
        except TaskzipError:
            if other is None:
                raise
            continue  # what PyTorch itself does not take, or answers with NaN, is nothing to compare with
        try:
            _compare(wanted, run(tensors), partial(_by_name, networks, example, tensors))
        except TaskzipError as error:
            if other is None:
                raise
            raise ExportError(f"with {_described(other)}: {str(error).rstrip('.')}") from error


def _described(sizes: int | Sizes) -> str:
    if isinstance(sizes, int):
        return f"batches of {sizes}"
    return " and ".join(f"{size} along axis {i} of {name}" for name, each in sizes.items() for i, size in each.items())


def _by_name(networks: Mapping[str, nn.Module], example: Example, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What PyTorch gives."""
    return {name: y for each in outputs(networks, example, tensors).values() for name, y in each.items()}


def _compare(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], again: Callable[[], Mapping[str, Tensor]]
) -> None:
    for name, right in wanted.items():
        difference = _difference(given[name], right)
        if difference:
            if _difference(again()[name], right):
                raise ExportError(f"{name!r} is another one each time that PyTorch computes it, for the same input.")
            raise ExportError(f"{name!r} {difference}.")


def _difference(given: Tensor, right: Tensor) -> str:
    """In which way a tensor is not what it should be; "" if it is."""
    if given.shape != right.shape:
        return f"is {list(given.shape)} where it was exported, but {list(right.shape)} in PyTorch"
    if given.dtype != right.dtype:
        return f"is of {given.dtype} where it was exported, but of {right.dtype} in PyTorch"
    if not right.numel():
        return ""
    given, right = given.cpu(), right.cpu()  # runtimes give what they give there
    if right.is_complex():
        given, right = torch.view_as_real(given), torch.view_as_real(right)
    if not right.dtype.is_floating_point:
        return "" if torch.equal(given, right) else "has other values where it was exported than in PyTorch"
    half = right.dtype.itemsize < 4
    relative = 4 * torch.finfo(right.dtype).eps if half else TOLERANCE
    given, right = given.double(), right.double()
    far, largest = (given - right).abs().max(), right.abs().max()
    if far <= _ROUNDING + relative * largest:
        return ""
    return f"differs from PyTorch's by {far:.1e} where it was exported; the largest value is {largest:.1e}"
