"""FLOPs of a forward pass, counted by running it, as `torch.utils.flop_counter` counts: a multiply-add is two.

Matrix products, convolutions and attention count; biases, activations, norms, pooling and moving data do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from taskzip.copying import uncompiled
from taskzip.tasks import Batch, Task, call, evaluating, input_tensors
from taskzip.zipped.network import JointNetwork


def count_flops(network: nn.Module, run: Callable[[], Any]) -> int:
    """FLOPs of whatever `run` computes with the network, in eval mode."""
    with evaluating(network), _frozen(network), _in_countable_steps(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def flops_per_sample(network: nn.Module, batch: Batch, run: Callable[[Batch], Any]) -> int:
    """FLOPs of one sample's forward pass: of the batch's first one, or the mean where only whole batches run."""
    try:
        return count_flops(
            network, partial(run, pytree.tree_map_only(Tensor, lambda t: t[:1] if t.dim() else t, batch))
        )
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a network raises that is made for batches of one size
        samples = next((len(tensor) for tensor in input_tensors(batch) if tensor.dim()), 1)
        return round(count_flops(network, partial(run, batch)) / max(samples, 1))


def record_flops(zipped: JointNetwork, tasks: Sequence[Task]) -> None:
    """Count the FLOPs for one sample of each task's data, and write them into the network's history.

    "originals" holds those of the networks that the tasks were given as; "tasks" those of each zipped task by itself;
    "together" those of `zipped(x)`, one input for all tasks, or None where the tasks do not take the same inputs.
    """
    batches = [next(task.batches()) for task in tasks]

    def count(network_of: Callable[[Task], nn.Module]) -> dict[str, int]:
        return {
            task.name: flops_per_sample(network_of(task), batch, partial(task.run, network_of(task)))
            for task, batch in zip(tasks, batches, strict=True)
        }

    originals, each = count(lambda task: uncompiled(task.model)), count(lambda task: zipped[task.name])
    alike = not any(task.forward for task in tasks) and all(_form(batch) == _form(batches[0]) for batch in batches)
    together = _together(zipped, batches[0]) if alike else None
    zipped.history.settings["flops"] = {"originals": originals, "tasks": each, "together": together}


def _together(zipped: JointNetwork, batch: Batch) -> int | None:
    try:
        return flops_per_sample(zipped, batch, partial(call, zipped))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError):  # a word of one task is none of the other's vocabulary
        return None


def _form(batch: Batch) -> Any:
    """What the inputs of a batch are, sample by sample."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    leaves, tree = pytree.tree_flatten(inputs)
    return tree, [(x.shape[1:], x.dtype) if isinstance(x, Tensor) else type(x) for x in leaves]


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Without gradients of parameters: torch's counter hangs hooks on those, which keeps them from being common."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


@contextmanager
def _in_countable_steps() -> Iterator[None]:
    """Without kernels that do in one step what torch's counter sees only in several: attention, recurrent layers."""
    fused = torch.backends.mha.get_fastpath_enabled()
    libraries: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    enabled = [library.enabled for library in libraries]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for library in libraries:
            library.enabled = False
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for library, was in zip(libraries, enabled, strict=True):
            library.enabled = was
