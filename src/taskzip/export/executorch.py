"""A joint network as one ExecuTorch file: a method for each task and one for all, and every shared block once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from taskzip.errors import ExportError
from taskzip.export.agreement import check_same
from taskzip.export.batch_norms import keep_apart
from taskzip.export.blockwise import join_weights, split_layers
from taskzip.export.delegation import lowered
from taskzip.export.example import Example
from taskzip.export.failures import explained, reason
from taskzip.export.graphs import JointGraph
from taskzip.export.joint import Joint, chosen, outputs
from taskzip.export.quiet import quietly
from taskzip.export.target import writable, writing
from taskzip.observation import evaluating
from taskzip.task import device_of
from taskzip.zipped import ZippedModel

ALL = "forward"
"""The method of all tasks together: the one that ExecuTorch's runtimes call unless another is named."""

_Outputs = Mapping[str, Mapping[str, Tensor]]
"""By task and name of the output."""

PIECE = 2**26
"""Bytes of weights that XNNPACK loads at once."""


def export_executorch(
    zipped: ZippedModel,
    path: str | Path,
    example: Any,
    tasks: Sequence[str] | None = None,
    max_batch: int | None = None,
    partly_shared: Literal["blocks", "weights"] = "blocks",
) -> dict[str, str]:
    """Write a joint network to one ExecuTorch file for XNNPACK, and check that its methods give the same outputs.

    There is a method for each task, and "forward" for all of them, in which what they have in common is computed once.
    The method of a task has its name where that is an identifier, such as "digits"; otherwise "_" stands for every
    other character and in front of a digit, and more of them behind a name that is taken. Inputs and outputs have no
    names: they come in the order of the example and of the network's output, in "forward" task by task.

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

    Returns:
        The name of each task's method.

    Raises:
        InputError: no joint network, tasks that it does not have, or an example or setting that does not fit.
        ExportError: packages that are not installed, a network that cannot be exported, a file that cannot be written,
            or one whose outputs differ from PyTorch's by more than `agreement.TOLERANCE`. Nothing is left behind.
    """
    _check_installed()
    networks = chosen(zipped, tasks)
    target = writable(path)
    given = Example(example, list(networks), device_of(zipped))
    methods = _methods(list(networks))
    with evaluating(*networks.values()), quietly():
        wanted = outputs(networks, given, given.tensors)
        program = _program(networks, given, wanted, max_batch, partly_shared)
        with writing(path, target) as part:
            with part.open("wb") as file:
                program.write_to_file(file)
            for tensors in [given.tensors, *([given.resized(max_batch)] if max_batch else [])]:
                _check(part, methods, outputs(networks, given, tensors), given, tensors)
    return methods


def _check_installed() -> None:
    try:
        with quietly():
            import executorch.exir
            import executorch.runtime  # noqa: F401
    except ModuleNotFoundError as error:
        raise ExportError(
            f"writing ExecuTorch files needs {error.name}, which is not installed: pip install 'taskzip[executorch]'"
        ) from error


def _methods(tasks: Sequence[str]) -> dict[str, str]:
    """The name of each task's method."""
    found = {task: task for task in tasks if task.isidentifier() and task != ALL}
    for task in tasks:
        if task not in found:
            name = re.sub(r"\W", "_", task)
            name = name if name.isidentifier() else f"_{name}"
            while name in (ALL, *found.values()):
                name += "_"
            found[task] = name
    return {task: found[task] for task in tasks}


def _program(
    networks: dict[str, nn.Module], example: Example, wanted: _Outputs, max_batch: int | None, form: str
) -> Any:
    """The ExecuTorch program of all methods."""
    try:
        return lowered(_exported(networks, example, wanted, max_batch, form), PIECE)
    except Exception as error:  # torch and ExecuTorch raise a dozen classes of their own

        def alone(name: str, dynamic: bool) -> object:
            each = {name: networks[name]}
            return lowered(
                _exported(each, example.only(name), {name: wanted[name]}, max_batch if dynamic else None, form), PIECE
            )

        raise explained(error, networks, alone, max_batch is not None, "leave max_batch away") from error


def _exported(
    networks: dict[str, nn.Module], example: Example, wanted: _Outputs, max_batch: int | None, form: str
) -> dict[str, ExportedProgram]:
    """A program for each method: parts of one graph, so that what they have in common is the same in all of them."""
    tensors = (
        example.resized(2) if max_batch else example.tensors
    )  # torch.export takes a 1 for a size that never changes
    axes = {batch: torch.export.Dim(batch, min=1, max=max_batch) for batch in example.batches.values()}
    shapes = {n: {0: axes[example.batches[n]]} if max_batch and n in example.batches else None for n in tensors}
    joint = torch.export.export(
        Joint(networks, example), (list(tensors.values()),), dynamic_shapes=(list(shapes.values()),), strict=False
    )
    graph = JointGraph(joint, list(tensors), [name for each in wanted.values() for name in each])
    if form == "blocks":
        split_layers(graph, PIECE)
    else:
        join_weights(graph)
    keep_apart(graph)
    methods = {name: [task] for task, name in _methods(list(networks)).items()} | {ALL: list(networks)}
    programs = {}
    for method, tasks in methods.items():
        inputs = [name for name in tensors if any(name in example.only(task).tensors for task in tasks)]
        part = graph.part(inputs, [name for task in tasks for name in wanted[task]])
        programs[method] = torch.export.export(
            part,
            tuple(tensors[name] for name in inputs),
            dynamic_shapes=tuple(shapes[name] for name in inputs),
            strict=False,
        )
    return programs


def _check(
    part: Path, methods: Mapping[str, str], wanted: _Outputs, example: Example, tensors: Mapping[str, Tensor]
) -> None:
    """Run the methods of the file and compare.

    Raises:
        ExportError: ExecuTorch cannot run it, or an output differs.
    """
    from executorch.runtime import Runtime

    runs = [(name, [task]) for task, name in methods.items()] + [(ALL, list(methods))]
    for method, tasks in runs:
        given = [t.contiguous() for n, t in tensors.items() if any(n in example.only(task).tensors for task in tasks)]
        try:
            program = Runtime.get().load_program(part)
            found = program.load_method(method).execute(given)
        except Exception as error:  # classes of its own without a common base
            raise ExportError(f"ExecuTorch cannot run what was exported: {reason(error)}.") from error
        right = {name: value for task in tasks for name, value in wanted[task].items()}
        for (name, value), other in zip(right.items(), found, strict=True):
            check_same(name, other, value)
