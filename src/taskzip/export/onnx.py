"""A joint network as one ONNX file: every shared block once, and what the tasks have in common computed once."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskzip.errors import ExportError, InputError, place_in_code
from taskzip.export.example import Call, Example
from taskzip.export.outputs import named_tensors
from taskzip.files import replacing
from taskzip.observation import evaluating
from taskzip.task import device_of
from taskzip.zipped import ZippedModel

TOLERANCE = 1e-4
"""How far the file's outputs may lie from PyTorch's, relative to the largest output of that name."""

LARGEST = 2**31 - 2**20
"""Bytes that one ONNX file can hold."""


def export_onnx(
    zipped: ZippedModel,
    path: str | Path,
    example: Any,
    tasks: Sequence[str] | None = None,
    dynamic_batch: bool = True,
) -> None:
    """Write a joint network to one ONNX file, and check with ONNX Runtime that it gives the same outputs.

    The outputs are called after the tasks: "digits", or "digits.0" and "digits.logits" where the network returns a
    tuple, a dict or a dataclass. A shared block is one initializer, from which each task's weight is put together in
    the graph; layers that are fully shared and read the same input run once.

    Args:
        zipped: the joint network; it is exported as it is in eval mode, and not changed.
        path: where the file goes.
        example: what the networks read, one input for all tasks: a tensor, a tuple of arguments, or a dict of keyword
            arguments. Or one for each task: a dict whose keys are the names of the exported tasks. The inputs of the
            file are then called "input", "input.0" or as the keyword; or "input.digits", "input.digits.0" and
            "input.digits.keyword".
        tasks: which tasks the file holds; default all.
        dynamic_batch: whether the file takes batches of any size: all tensors whose first axis is as long as that of
            the first tensor.

    Raises:
        InputError: tasks that the network does not have, or an example that does not fit.
        ExportError: packages that are not installed, a network that cannot be exported, a file that cannot be written,
            or one that gives other outputs than PyTorch. Nothing is left behind.
    """
    _check_installed()
    target = _writable(path)
    networks = _chosen(zipped, tasks)
    given = Example(example, list(networks), device_of(zipped))
    with evaluating(*networks.values()):
        wanted = _outputs(networks, given, given.tensors)
        model = _model(networks, given, list(wanted), dynamic_batch)
        try:
            with replacing(target) as part:
                _write(model, path, part)
                _check(part, networks, given, dynamic_batch)
        except OSError as error:
            raise ExportError(
                f"cannot write {path}: {error.strerror}. Is the folder writable, and has it room?"
            ) from error


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ExportError(
            f"writing ONNX needs {error.name}, which is not installed: pip install 'taskzip[onnx]'"
        ) from error


def _writable(path: str | Path) -> Path:
    """Where a symbolic link points, instead of replacing the link."""
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise ExportError(f"cannot write {path}: there is no folder {target.parent}.")
    if target.is_dir():
        raise ExportError(f"cannot write {path}: it is a folder.")
    return target


def _chosen(zipped: ZippedModel, tasks: Sequence[str] | None) -> dict[str, nn.Module]:
    names = list(zipped) if tasks is None else [tasks] if isinstance(tasks, str) else list(dict.fromkeys(tasks))
    unknown = [name for name in names if name not in list(zipped)]
    if unknown or not names:
        wrong = f"no task {unknown[0]!r}" if unknown else "no task was chosen"
        raise InputError(f"{wrong}: this network has {', '.join(zipped)}.")
    return {name: zipped[name] for name in names}


class _Joint(nn.Module):
    """The tasks, called with the example's tensors; gives the tensors of all outputs."""

    def __init__(self, networks: dict[str, nn.Module], example: Example) -> None:
        super().__init__()
        self.tasks = nn.ModuleDict(networks)
        self._example = example

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        calls = self._example.calls(dict(zip(self._example.tensors, tensors, strict=True)))
        return [tensor for name, network in self.tasks.items() for _, tensor in _run(network, calls[name], name)]


def _run(network: nn.Module, call: Call, name: str) -> Iterator[tuple[str, Tensor]]:
    args, kwargs = call
    return named_tensors(network(*args, **kwargs), name)


def _outputs(networks: dict[str, nn.Module], example: Example, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What PyTorch gives, by name."""
    calls = example.calls(tensors)
    found: dict[str, Tensor] = {}
    for name, network in networks.items():
        try:
            given = dict(_run(network, calls[name], name))
        except Exception as error:  # whatever the network raises
            raise InputError(
                f"example does not fit task {name!r}: {type(network).__name__} does not take {_shapes(tensors)} "
                f"({_reason(error)})."
            ) from error
        if not given:
            raise ExportError(f"task {name!r} cannot be exported: its output has no tensors.")
        if not all(torch.isfinite(tensor).all() for tensor in given.values()):
            raise ExportError(
                f"task {name!r} gives NaN or infinite values for the example, so that a file could not be checked: "
                f"give another example."
            )
        found |= given
    taken = sorted(set(found) & set(tensors))
    if taken:
        raise InputError(f"{taken[0]!r} would be the name of both an input and an output: rename the task or keyword.")
    return found


def _model(networks: dict[str, nn.Module], example: Example, outputs: list[str], dynamic_batch: bool) -> Any:
    """The graph of all tasks, in which equal parts are one."""
    try:
        program = _program(networks, example, outputs, dynamic_batch)
    except Exception as error:  # torch raises whatever the network raises, and a dozen classes of its own
        raise _explained(error, networks, example, dynamic_batch) from error
    _unite(program.model)
    _name_batches(program.model, example.batches)
    return program.model


def _program(networks: dict[str, nn.Module], example: Example, outputs: list[str] | None, dynamic_batch: bool) -> Any:
    import torch.onnx

    joint = _Joint(networks, example)
    tensors, shapes = list(example.tensors.values()), None
    if dynamic_batch:
        tensors = list(example.repeated(2).values())  # torch.export takes a size of 1 for one that never changes
        axes = {batch: torch.export.Dim(batch) for batch in example.batches.values()}
        shapes = ([{0: axes[example.batches[n]]} if n in example.batches else None for n in example.tensors],)
    with _quiet():
        exported = torch.export.export(joint, (tensors,), dynamic_shapes=shapes, strict=False)
        return torch.onnx.export(
            exported,
            input_names=list(example.tensors),
            output_names=outputs,
            dynamo=True,
            # Would put weights together while exporting, each a copy of its blocks, and fold private batch-norm
            # into copies of shared kernels.
            optimize=False,
            verbose=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that nobody asked for, and of its own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _unite(model: Any) -> None:
    """Compute shapes that are known; then equal constants become one, and equal nodes over them."""
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    weights = set(model.graph.initializers)
    optimizer.fold_constants(
        model, should_fold=lambda node: False if any(i is not None and i.name in weights for i in node.inputs) else None
    )
    for each in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateHashedInitializersPass(size_limit=LARGEST),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        each(model)


def _name_batches(model: Any, batches: dict[str, str]) -> None:
    """Call the axes of any length by their names, where the exporter has numbers for them."""
    import onnx_ir

    found = {value.name: value.shape[0] for value in model.graph.inputs if value.name in batches}
    names = {dim.value: batches[name] for name, dim in found.items() if isinstance(dim, onnx_ir.SymbolicDim)}
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for shape in (value.shape for value in values if value.shape is not None):
        for i, dim in enumerate(shape):
            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value in names:
                shape[i] = names[dim.value]


def _explained(error: Exception, networks: dict[str, nn.Module], example: Example, dynamic_batch: bool) -> ExportError:
    """Which task it is that cannot be exported: the first one that cannot by itself."""
    for name, network in networks.items():
        try:
            _program({name: network}, example.only(name), None, dynamic_batch)
        except Exception as found:  # as above
            hint = " If it is made for one size of batch: dynamic_batch=False." if dynamic_batch else ""
            return ExportError(
                f"task {name!r} cannot be exported: {type(network).__name__}: {_reason(found)}{place_in_code(found)}."
                f"{hint}"
            )
    return ExportError(f"the tasks cannot be exported together, though each can alone: {_reason(error)}.")


def _write(model: Any, path: str | Path, part: Path) -> None:
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size > LARGEST:
        raise ExportError(f"cannot write {path}: the weights are {size / 2**30:.1f} GiB, and one ONNX file holds 2.")
    part.write_bytes(onnx_ir.to_proto(model).SerializeToString())


def _check(part: Path, networks: dict[str, nn.Module], example: Example, dynamic_batch: bool) -> None:
    """Run the file on the example, and on one with another number of samples, and compare.

    Raises:
        ExportError: ONNX Runtime cannot run it, or an output differs.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
    except Exception as error:  # classes of its own without a common base
        raise ExportError(f"ONNX Runtime cannot load what was exported: {_reason(error)}.") from error
    read = {value.name for value in session.get_inputs()}
    for tensors in [example.tensors, *([example.repeated(3)] if dynamic_batch else [])]:
        wanted = _outputs(networks, example, tensors)
        found = session.run(list(wanted), {name: t.numpy(force=True) for name, t in tensors.items() if name in read})
        for (name, right), given in zip(wanted.items(), found, strict=True):
            _compare(name, torch.from_numpy(given), right.cpu())


def _compare(name: str, given: Tensor, right: Tensor) -> None:
    if given.shape != right.shape:
        raise ExportError(f"{name!r} is {list(given.shape)} in the exported file, but {list(right.shape)} in PyTorch.")
    given, right = given.double(), right.double()
    if right.numel() and not (given - right).abs().max() <= TOLERANCE * right.abs().max():
        raise ExportError(
            f"{name!r} differs between the exported file and PyTorch by {(given - right).abs().max():.1e}, where the "
            f"largest value is {right.abs().max():.1e}: nothing was written."
        )


def _shapes(tensors: dict[str, Tensor]) -> str:
    kinds = {name: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in tensors.items()}
    return ", ".join(f"{name} of {kind}" for name, kind in kinds.items())


def _reason(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
