"""A joint network as one ONNX file: every shared block once, and what the tasks have in common computed once."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taskzip.errors import ExportError, InputError, first_line
from taskzip.export.example import Call, Example
from taskzip.export.failures import place, reason
from taskzip.export.outputs import named_tensors
from taskzip.export.selections import move_selections
from taskzip.files import replacing
from taskzip.observation import evaluating
from taskzip.task import device_of
from taskzip.zipped import ZippedModel
from taskzip.zipped.blocks import installed, spec_of

TOLERANCE = 1e-4
"""How far the file's outputs may lie from PyTorch's, relative to the largest output of that name.

Numbers of half precision, of which one step is more than this, may be four steps away."""

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
    the graph; layers that are fully shared and read the same input run once, and with `zip(cross=False)` what is shared
    of each layer.

    Args:
        zipped: the joint network; it is exported as it is in eval mode, and not changed.
        path: where the file goes.
        example: what the networks read, one input for all tasks: a tensor, a tuple of arguments, or a dict of keyword
            arguments. Or one for each task: a dict whose keys are the names of the exported tasks. The inputs of the
            file are then called "input", "input.0" or as the keyword; or "input.digits", "input.digits.0" and
            "input.digits.keyword". Arguments that are no tensors become part of the file.
        tasks: which tasks the file holds, and in which order; default all.
        dynamic_batch: whether the file takes batches of any size: all tensors whose first axis is as long as that of
            the first tensor.

    Raises:
        InputError: no joint network, tasks that it does not have, or an example that does not fit.
        ExportError: packages that are not installed, a network that cannot be exported, a file that cannot be written,
            or one whose outputs differ from PyTorch's by more than `TOLERANCE`. Nothing is left behind.
    """
    _check_installed()
    if not isinstance(zipped, ZippedModel):
        raise InputError(f"what is exported is a joint network, as tz.zip gives it, not a {type(zipped).__name__}.")
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
                f"cannot write {path}: {error.strerror or error}. Is the folder writable, and has it room?"
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
    """Where a symbolic link points, instead of replacing the link; refused before the work and not after it."""
    try:
        target = Path(path).resolve()
        if not target.parent.is_dir():
            raise ExportError(f"cannot write {path}: there is no folder {target.parent}.")
        if target.exists() and not target.is_file():
            raise ExportError(f"cannot write {path}: it is a {'folder' if target.is_dir() else 'device'} and no file.")
    except (OSError, RuntimeError) as error:  # too long a name; links that lead in a circle
        raise ExportError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}.") from error
    if not os.access(target.parent, os.W_OK):
        raise ExportError(f"cannot write {path}: the folder {target.parent} is not writable.")
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
                f"({first_line(error)})."
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
        model = _program(networks, example, outputs, dynamic_batch).model
    except Exception as error:  # torch raises whatever the network raises, and a dozen classes of its own
        raise _explained(error, networks, example, dynamic_batch) from error
    with _quiet():
        _unite(model, any(spec_of(b).apart for network in networks.values() for b in installed(network).values()))
        _name(model, list(example.tensors), outputs)
    _name_batches(model, example.batches)
    return model


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
    levels = {logger: logger.level for logger in map(logging.getLogger, ("torch.onnx", "onnx_ir"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        try:
            for logger in levels:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)


def _unite(model: Any, apart: bool) -> None:
    """Compute shapes that are known; then equal constants become one, and equal nodes over them.

    Where units are computed `apart`, so is what is done with them up to the next layer.
    """
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    # Orders of units, which are whole numbers, may be computed with; weights may not, for that would copy them.
    weights = {name for name, value in model.graph.initializers.items() if not value.dtype.is_integer()}
    optimizer.fold_constants(
        model, should_fold=lambda node: False if any(i is not None and i.name in weights for i in node.inputs) else None
    )
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    if apart:
        move_selections(model)
    for each in (
        passes.DeduplicateHashedInitializersPass(size_limit=LARGEST),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.OutputFixPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        each(model)


def _name(model: Any, inputs: list[str], outputs: list[str]) -> None:
    """Call inputs and outputs what they should be: one that is both, or two outputs at once, has lost its name."""
    import onnx_ir.passes.common as passes

    values = [value for node in model.graph for value in node.outputs]
    for value in values:
        value.name = None
    for value in (*values, *model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()  # what torch called it
    for value, name in zip([*model.graph.inputs, *model.graph.outputs], [*inputs, *outputs], strict=True):
        value.name = name
    passes.NameFixPass()(model)


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
        found = _refusal(network, name, example, dynamic_batch)
        if found is not None:
            why = f"task {name!r} cannot be exported: {type(network).__name__}: {reason(found)}{place(found)}."
            if dynamic_batch and _refusal(network, name, example, dynamic_batch=False) is None:
                why += " For the example's size of batch alone it can: dynamic_batch=False."
            return ExportError(why)
    return ExportError(f"the tasks cannot be exported together, though each can alone: {reason(error)}.")


def _refusal(network: nn.Module, name: str, example: Example, dynamic_batch: bool) -> Exception | None:
    try:
        _program({name: network}, example.only(name), None, dynamic_batch)
    except Exception as error:  # as above
        return error
    return None


def _write(model: Any, path: str | Path, part: Path) -> None:
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size > LARGEST:
        raise ExportError(f"cannot write {path}: the weights are {size / 2**30:.1f} GiB, and one ONNX file holds 2.")
    proto = onnx_ir.to_proto(model)
    # Weights say by themselves what type and shape they have.
    others = [info for info in proto.graph.value_info if info.name not in model.graph.initializers]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(others)
    part.write_bytes(proto.SerializeToString())


def _check(part: Path, networks: dict[str, nn.Module], example: Example, dynamic_batch: bool) -> None:
    """Run the file on the example, and on one with another number of samples, and compare.

    Raises:
        ExportError: ONNX Runtime cannot run it, or an output differs.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
    except Exception as error:  # classes of its own without a common base
        raise ExportError(f"ONNX Runtime cannot load what was exported: {reason(error)}.") from error
    read = {value.name for value in session.get_inputs()}
    for tensors in [example.tensors, *([example.repeated(3)] if dynamic_batch else [])]:
        wanted = _outputs(networks, example, tensors)
        try:
            given = {name: tensor.numpy(force=True) for name, tensor in tensors.items() if name in read}
            found = [torch.as_tensor(value) for value in session.run(list(wanted), given)]
        except Exception as error:  # as above
            raise ExportError(f"ONNX Runtime cannot run what was exported: {reason(error)}.") from error
        for (name, right), value in zip(wanted.items(), found, strict=True):
            _compare(name, value, right.cpu())


def _compare(name: str, given: Tensor, right: Tensor) -> None:
    if given.shape != right.shape:
        raise ExportError(f"{name!r} is {list(given.shape)} in the exported file, but {list(right.shape)} in PyTorch.")
    half = right.dtype.is_floating_point and right.dtype.itemsize < 4
    tolerance = 4 * torch.finfo(right.dtype).eps if half else TOLERANCE
    given, right = given.double(), right.double()
    if right.numel() and not (given - right).abs().max() <= tolerance * right.abs().max():
        raise ExportError(
            f"{name!r} differs between the exported file and PyTorch by {(given - right).abs().max():.1e}, where the "
            f"largest value is {right.abs().max():.1e}: nothing was written."
        )


def _shapes(tensors: dict[str, Tensor]) -> str:
    kinds = {name: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in tensors.items()}
    return ", ".join(f"{name} of {kind}" for name, kind in kinds.items())
