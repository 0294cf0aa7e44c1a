"""How a network is run while it is looked at: in eval mode, without gradients, and left as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from taskzip.errors import InputError
from taskzip.tasks.task import Batch, Task, input_tensors


@contextmanager
def keeping_modes(*models: nn.Module) -> Iterator[None]:
    """Leave every module's mode as it was."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def counted_calls(network: nn.Module) -> Iterator[Counter[str]]:
    """How often each module of a network is called meanwhile, by its path."""
    calls: Counter[str] = Counter()
    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: calls.update([path]))
        for path, module in network.named_modules()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run models in eval mode without gradients, and leave every module's mode and buffers as they were."""
    with in_eval_mode(*models), torch.no_grad():
        yield


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode, and leave every module's mode and buffers as they were."""
    modules = {module for model in models for module in model.modules()}
    buffers = [(module, dict(module._buffers)) for module in modules if module._buffers]
    values = {b: (b.detach().clone(), version(b)) for _, each in buffers for b in each.values() if b is not None}
    try:
        with keeping_modes(*models):
            for model in models:
                model.eval()
            yield
    finally:
        for module, each in buffers:
            module._buffers.update(each)
        with torch.no_grad():
            for buffer, (value, before) in values.items():
                if version(buffer) != before:
                    buffer.copy_(value)


def version(tensor: Tensor) -> object:
    """What is another one after the tensor was written to; tensors of inference mode do not tell, so always."""
    return object() if tensor.is_inference() else tensor._version


def run_batch(task: Task, model: nn.Module, batch: Batch, index: int) -> Any:
    """Run one batch of the task's data.

    Raises:
        InputError: the network does not take the batch, naming its shapes.
    """
    try:
        return task.run(model, batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in input_tensors(batch))
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"task {task.name!r}: the network fails on batch {index} with inputs {shapes}: {reason}"
        ) from error
