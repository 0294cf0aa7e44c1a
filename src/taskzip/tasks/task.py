"""A task: a name, a trained network, data to calibrate on, and how the network is called and judged."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from taskzip.errors import InputError

Batch = Any
"""A tensor, `(inputs, targets)`, or a dict of keyword arguments for the network."""


@dataclass(frozen=True)
class Task:
    """One trained network and what is needed to zip and retrain it.

    Args:
        name: how the joint network calls the task; letters, digits, "_" and "-".
        model: the trained network. It is never changed.
        data: a re-iterable of batches (a list, a `DataLoader`), each a tensor of inputs, a pair `(inputs, targets)`
            whose inputs may be a tuple of tensors, or a dict for `model(**batch)`. The first axis of every tensor is
            the sample.
        loss: `loss(output, targets)`, a mean over the batch; read only to retrain. Torch's own losses get the tensor
            that is the answer where the output holds more (`.logits` of Hugging Face's models), all others the output
            as it is. Default: the loss that the network returns by itself where the batch has labels, else
            cross-entropy, of classes along the axis that the targets tell.
        metric: `metric(output, targets)` of a batch, higher is better: a number, or a tensor with one value per sample;
            read by `MaxDrop` only.
        forward: `forward(model, batch)` if the network is called in another way than the forms of `data` say. Parts
            that it does not call are not followed: hidden units may lie in another order for other methods.
        teach: what the network teaches where `loss="distill"`: the axis of its output along which class scores lie (1
            as in torch, -1 of sequences), "binary" for answers of yes or no each by itself (logits), "values" for
            anything else, or a function `loss(output, taught)` of both networks' outputs. By default ("auto") classes
            where the targets number them, where `loss` is cross-entropy or where the output is called logits; "binary"
            where `loss` is torch's for that; else values, which is right whatever they mean.

    Raises:
        InputError: a name, model or `teach` that cannot be used, or data that can be read only once.
    """

    name: str
    model: nn.Module
    data: Iterable[Batch]
    loss: Callable[[Any, Any], Tensor] | None = None
    metric: Callable[[Any, Any], Any] | None = None
    forward: Callable[[nn.Module, Batch], Any] | None = None
    teach: Literal["auto", "values", "binary"] | int | Callable[[Any, Any], Tensor] = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name):
            raise InputError(
                f"task name {self.name!r} cannot be used: take letters, digits, '_' and '-', the first no sign."
            )
        if hasattr(nn.ModuleDict(), self.name):
            raise InputError(f"task name {self.name!r} is an attribute of torch's ModuleDict: choose another name.")
        if keyword.iskeyword(self.name):
            raise InputError(f"task name {self.name!r} is a word of Python to torch's graphs: choose another name.")
        if not isinstance(self.model, nn.Module):
            raise InputError(f"task {self.name!r}: model must be a torch nn.Module, got {type(self.model).__name__}.")
        if isinstance(self.data, Tensor):
            raise InputError(
                f"task {self.name!r}: data is one tensor of shape {tuple(self.data.shape)}, not batches: "
                f"use taskzip.datasets.batches(inputs, targets) or a DataLoader."
            )
        if isinstance(self.data, str) or not isinstance(self.data, Iterable):
            raise InputError(
                f"task {self.name!r}: data must be a re-iterable of batches, got {type(self.data).__name__}."
            )
        if isinstance(self.data, Iterator):
            raise InputError(
                f"task {self.name!r}: data is a {type(self.data).__name__}, which can be read only once, and zipping "
                f"reads it several times: pass list(...) or a DataLoader."
            )
        if self.loss is not None and not callable(self.loss):
            raise InputError(f"task {self.name!r}: loss={self.loss!r} must be a function of output and targets.")
        axis = isinstance(self.teach, int) and not isinstance(self.teach, bool)
        if self.teach not in ("auto", "values", "binary") and not axis and not callable(self.teach):
            raise InputError(
                f"task {self.name!r}: teach={self.teach!r} is not known: choose 'auto', 'values', 'binary', the axis "
                f"of the classes, or a function of both outputs."
            )

    def run(self, model: nn.Module, batch: Batch) -> Any:
        """Call `model` on a batch the way this task is called."""
        return call(model, batch, self.forward)

    def targets(self, batch: Batch) -> Any:
        """The targets of a batch, or None where it has none."""
        if isinstance(batch, Mapping):
            return batch.get("labels")
        return batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None

    def batches(self) -> Iterator[Batch]:
        """The calibration batches, one pass, on the device of the model; batches without samples are left out."""
        device = device_of(self.model)
        for batch in self.data:
            if samples_in(batch):
                yield pytree.tree_map_only(Tensor, lambda t: t.to(device), plain(batch))

    def check_data(self) -> int:
        """Read the data once and return the number of samples.

        Raises:
            InputError: no batches, no samples, or values that are not finite, naming the batch.
        """
        samples = 0
        for index, batch in enumerate(self.data):
            tensors = input_tensors(batch)
            if not tensors or any(t.dim() == 0 for t in tensors):
                raise InputError(
                    f"task {self.name!r}: batch {index} is a {type(batch).__name__} without a tensor of samples."
                )
            samples += len(tensors[0])
            if any(has_numbers(t) and not torch.isfinite(t).all() for t in tensors):
                raise InputError(
                    f"task {self.name!r}: batch {index} of the calibration data has NaN or infinite values."
                )
        if not samples:
            raise InputError(
                f"task {self.name!r}: the calibration data are empty: pass at least one batch with one sample."
            )
        return samples


def call(model: nn.Module, batch: Batch, forward: Callable[[nn.Module, Batch], Any] | None = None) -> Any:
    """Call a network on a copy of a batch, for some write into their input: a tensor, `(inputs, targets)` or a dict.

    Args:
        model: the network.
        batch: what it reads; it is not changed.
        forward: `forward(model, batch)` if the network is called in another way.
    """
    batch = pytree.tree_map_only(Tensor, torch.clone, plain(batch))
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, dict):
        return model(**batch)
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def plain(batch: Batch) -> Batch:
    """A batch that torch can look into: a dict for any other mapping."""
    return dict(batch) if isinstance(batch, Mapping) else batch


def samples_in(batch: Batch) -> int:
    """How many samples a batch holds: the length of its first input."""
    return len(input_tensors(batch)[0])


def input_tensors(batch: Batch) -> list[Tensor]:
    """The tensors that go into the network, in order."""
    inputs = dict(batch) if isinstance(batch, Mapping) else batch[:1] if isinstance(batch, (tuple, list)) else batch
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point numbers, real or complex."""
    return tensor.is_floating_point() or tensor.is_complex()


def device_of(model: nn.Module) -> torch.device:
    """Where the network's first parameter or buffer lies; the CPU for a network without any."""
    first = next(iter((*model.parameters(), *model.buffers())), None)
    return torch.device("cpu") if first is None else first.device
