"""A joint network as one ExecuTorch file: a method for each task and one for all, and every shared block once."""

from __future__ import annotations

import functools
import gc
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from taskzip.copying import copy_of
from taskzip.errors import ExportError, InputError
from taskzip.export.agreement import check, other_sizes
from taskzip.export.batch_norms import keep_apart
from taskzip.export.blockwise import give_own_weights, join_weights, split_layers
from taskzip.export.delegation import lowered
from taskzip.export.dynamic import Axes, batch_axes, chosen_axes, described, one_by_one, other_shapes
from taskzip.export.example import Example
from taskzip.export.failures import explained, reason
from taskzip.export.graphs import JointGraph
from taskzip.export.joint import check_form, chosen, output_names, traced
from taskzip.export.quiet import quietly
from taskzip.export.target import Unwritten, on_disk, writable, writing
from taskzip.tasks import device_of, evaluating
from taskzip.zipped import ZippedModel

ALL = "forward"
"""The method of all tasks together: the one that ExecuTorch's runtimes call unless another is named."""

PIECE = 2**26
"""Bytes of weights that XNNPACK loads at once."""


def export_executorch(
    zipped: ZippedModel,
    path: str | Path,
    example: Any,
    tasks: Sequence[str] | None = None,
    max_batch: int | None = None,
    partly_shared: Literal["blocks", "weights"] = "blocks",
    dynamic_shapes: Any = None,
) -> dict[str, str]:
    """Write a joint network to one ExecuTorch file for XNNPACK, and check that its methods give the same outputs.

    There is a method for each task, and "forward" for all of them, in which what they have in common is computed once.
    The method of a task has its name, with "_" for "-", in front of a digit, and behind a name that another task has.
    Inputs and outputs have no names: they come in the order of the example and of the network's output, in "forward"
    task by task.

    Args:
        zipped: the joint network; it is exported as it is in eval mode, and not changed.
        path: where the file goes.
        example: what the networks read, one input for all tasks: a tensor, a tuple of arguments, or a dict of keyword
            arguments. Or one for each task: a dict whose keys are the names of the exported tasks. Arguments that are
            no tensors become part of the file.
        tasks: which tasks the file holds, and in which order; default all.
        max_batch: with it, the file takes batches of up to so many samples: all tensors whose first axis is as long as
            that of the first tensor. Default: batches of the example's size only.
        partly_shared: a layer of which only some units are shared is computed from its "blocks", each of which is in
            the file once; or from "weights" of its own for each task, which runs faster and makes a larger file.
        dynamic_shapes: in place of `max_batch`, which axes may have other sizes than in the example: in its form, with
            what `torch.export.export` takes for each tensor, {1: Dim("length", min=2, max=512)}; every `Dim` has a max.

    Returns:
        The name of each task's method.

    Raises:
        InputError: no joint network, tasks that it does not have, or an example or setting that does not fit.
        ExportError: packages that are not installed, a network that cannot be exported, a file that cannot be written,
            or one whose outputs differ from PyTorch's by more than `agreement.TOLERANCE`. Nothing is left behind.
    """
    _check_installed()
    check_form(partly_shared)
    networks = chosen(zipped, tasks)
    target = writable(path)
    given = Example(example, list(networks), torch.device("cpu"))
    _check_batch(given, max_batch)
    axes, by_batch = _axes(given, max_batch, dynamic_shapes), dynamic_shapes is None
    if device_of(zipped).type != "cpu":  # XNNPACK's programs are made, and checked, where they run
        networks = copy_of(networks)
        nn.ModuleList(networks.values()).cpu()

    def made(tasks: Sequence[str], example: Example, axes: Axes, file: Path) -> dict[str, str]:
        some, methods = {task: networks[task] for task in tasks}, _methods(tasks)
        joint, tensors = traced(some, example, axes)
        largest = max_batch if by_batch and axes else None
        sizes = other_sizes(example, largest) if largest else other_shapes(joint, list(tensors))
        program = _lowered(_exported(joint, tensors, called, methods, example, axes, partly_shared))
        with on_disk(path), file.open("wb") as opened:
            program.write_to_file(opened)
        del program, joint
        gc.collect()  # it refers to itself, and holds several copies of all weights
        for method, run_by in _tasks_of(methods).items():
            run = _runner(file, method, example.read_by(run_by), [name for task in run_by for name in called[task]])
            check({task: networks[task] for task in run_by}, example, sizes, run)
        return methods

    with evaluating(*networks.values()), quietly(), writing(path, target) as part:
        called = output_names(networks, given)

        def alone(task: str, axes: Axes) -> None:
            made([task], given.only(task), axes, part)

        try:
            return made(list(networks), given, axes, part)
        except Unwritten:
            raise
        except Exception as error:  # torch and ExecuTorch raise a dozen classes of their own
            raise explained(error, networks, alone, axes, "leave max_batch away" if by_batch else None) from error


def _check_installed() -> None:
    try:
        with quietly():
            import executorch.backends.xnnpack.partition.xnnpack_partitioner
            import executorch.exir
            import executorch.runtime

            executorch.runtime.Runtime.get()
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name
        what = f"{error.name}, which is not installed" if absent else f"ExecuTorch, which cannot be imported ({error})"
        raise ExportError(f"writing ExecuTorch files needs {what}: pip install 'taskzip[executorch]'") from error


def _check_batch(example: Example, max_batch: int | None) -> None:
    if max_batch is None:
        return
    if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 2:
        raise InputError(
            f"max_batch is a number of samples from 2 on, or None for the example's own, not {max_batch!r}."
        )
    if example.samples > max_batch:
        raise InputError(f"example has {example.samples} samples, more than max_batch={max_batch}.")


def _axes(example: Example, max_batch: int | None, dynamic_shapes: Any) -> Axes:
    if dynamic_shapes is None:
        return batch_axes(example, 1, max_batch) if max_batch else {}
    if max_batch is not None:
        raise InputError("dynamic_shapes takes the place of max_batch: give one of them.")
    axes = chosen_axes(example, dynamic_shapes)
    for dim in one_by_one(axes):
        if not all(isinstance(getattr(each, "max", None), int) for dims in dim.values() for each in dims.values()):
            raise InputError(
                f"dynamic_shapes gives no largest size for {described(dim)}, and ExecuTorch sets memory aside for it: "
                f"give Dim(..., max=...)."
            )
    return axes


def _methods(tasks: Sequence[str]) -> dict[str, str]:
    """The name of each task's method: names of tasks are of letters, digits, "_" and "-", and never "forward"."""
    found = {task: task for task in tasks if task.isidentifier()}
    for task in tasks:
        if task not in found:
            name = re.sub(r"^(?=\d)|-", "_", task)
            while name in found.values():
                name += "_"
            found[task] = name
    return {task: found[task] for task in tasks}


def _tasks_of(methods: Mapping[str, str]) -> dict[str, list[str]]:
    """The tasks that each method runs."""
    return {method: [task] for task, method in methods.items()} | {ALL: list(methods)}


def _exported(
    joint: ExportedProgram,
    tensors: Mapping[str, Tensor],
    names: Mapping[str, Sequence[str]],
    methods: Mapping[str, str],
    example: Example,
    axes: Axes,
    form: str,
) -> dict[str, ExportedProgram]:
    """A program for each method: parts of one graph, so that what they have in common is the same in all of them."""
    graph = JointGraph(joint, list(tensors), [name for task in methods for name in names[task]])
    if form == "blocks":
        split_layers(graph, PIECE)
    else:
        join_weights(graph)
    keep_apart(graph)
    give_own_weights(graph)
    programs = {}
    for method, tasks in _tasks_of(methods).items():
        inputs = example.read_by(tasks)
        part = graph.part(inputs, [name for task in tasks for name in names[task]])
        programs[method] = torch.export.export(
            part,
            tuple(tensors[name] for name in inputs),
            dynamic_shapes=tuple(axes.get(name) for name in inputs),
            strict=False,
        )
    return programs


def _lowered(programs: Mapping[str, ExportedProgram]) -> Any:
    try:
        return lowered(programs, PIECE)
    except OSError as error:
        why = f"{error.strerror or error}, in temporary files. Is {tempfile.gettempdir()} writable, and has it room?"
        raise Unwritten(f"the tasks cannot be exported: {why}") from error


def _runner(
    file: Path, method: str, inputs: Sequence[str], names: Sequence[str]
) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Gives the outputs of a method, by name, from tensors by name.

    Raises:
        ExportError: ExecuTorch cannot load or run it.
    """
    from executorch.runtime import Runtime

    loaded = functools.cache(lambda: Runtime.get().load_program(file).load_method(method))

    def run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            found = loaded().execute([tensors[name] for name in inputs])
        except Exception as error:  # classes of its own without a common base
            raise ExportError(f"what was exported cannot be run by ExecuTorch: {reason(error)}") from error
        return dict(zip(names, found, strict=True))

    return run
