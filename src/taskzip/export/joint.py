"""The chosen tasks as one module, which exporters trace, and what PyTorch gives for the example."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from taskzip.errors import ExportError, InputError, first_line, place_in_code
from taskzip.export.dynamic import Axes, traceable
from taskzip.export.example import Example
from taskzip.export.outputs import named_tensors
from taskzip.export.quiet import quietly, without_graph
from taskzip.tasks import Call
from taskzip.zipped import ZippedModel


def chosen(zipped: ZippedModel, tasks: Sequence[str] | None) -> dict[str, nn.Module]:
    """The networks that are exported, by task.

    Raises:
        InputError: no joint network, tasks that it does not have, or weights without values.
    """
    if not isinstance(zipped, ZippedModel):
        raise InputError(f"what is exported is a joint network, as tz.zip gives it, not a {type(zipped).__name__}.")
    if tasks is not None and not isinstance(tasks, Iterable):
        raise InputError(f"tasks is a list of their names, not {tasks!r}.")
    names = list(zipped) if tasks is None else [tasks] if isinstance(tasks, str) else list(dict.fromkeys(tasks))
    unknown = [name for name in names if name not in list(zipped)]
    if unknown or not names:
        wrong = f"no task {unknown[0]!r}" if unknown else "no task was chosen"
        raise InputError(f"{wrong}: this network has {', '.join(zipped)}.")
    found = {name: zipped[name] for name in names}
    for name, network in found.items():
        if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
            raise InputError(f"task {name!r} has weights without values, on the device meta: load a checkpoint first.")
    return found


def check_form(partly_shared: object) -> None:
    """Refuse another form of layers that are shared in part than from blocks or with weights of their own.

    Raises:
        InputError: as it says.
    """
    if partly_shared not in ("blocks", "weights"):
        raise InputError(f"partly_shared is 'blocks' or 'weights', not {partly_shared!r}.")


class Joint(nn.Module):
    """The tasks, called with the example's tensors; gives the tensors of all outputs."""

    def __init__(self, networks: dict[str, nn.Module], example: Example) -> None:
        super().__init__()
        self.names, self.networks = list(networks), nn.ModuleList(networks.values())
        self._example = example

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors lie as in the example, the outputs as `outputs` names them."""
        calls = self._example.calls(dict(zip(self._example.tensors, tensors, strict=True)))
        each = zip(self.names, self.networks, strict=True)
        return [tensor for name, network in each for _, tensor in _run(network, calls[name], name)]


def traced(networks: dict[str, nn.Module], example: Example, axes: Axes) -> tuple[ExportedProgram, dict[str, Tensor]]:
    """All tasks as one program of torch, with a list of the example's tensors for its input.

    Args:
        networks: by task.
        example: of what they read.
        axes: of the tensors that may have other sizes than in the example.

    Returns:
        The program, and the tensors from which it was made.
    """
    axes = {name: each for name, each in axes.items() if name in example.tensors}
    tensors = traceable(example, axes)
    joint = Joint(networks, example)
    given, shapes = (list(tensors.values()),), ([axes.get(name) for name in tensors],)
    with quietly(), without_graph():
        return torch.export.export(joint, given, dynamic_shapes=shapes, strict=False), tensors


def _run(network: nn.Module, call: Call, name: str) -> Iterator[tuple[str, Tensor]]:
    args, kwargs = call
    return named_tensors(network(*args, **kwargs), name)


def outputs(
    networks: Mapping[str, nn.Module], example: Example, tensors: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """What PyTorch gives, by task and name of the output.

    Raises:
        InputError: an example that does not fit, two outputs of one name, or one that is called as an input is.
        ExportError: outputs without tensors, or with values that cannot be compared.
    """
    calls = example.calls(tensors)
    taken = list(tensors)
    found: dict[str, dict[str, Tensor]] = {}
    for name, network in networks.items():
        try:
            given = list(_run(network, calls[name], name))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the network raises
            raise InputError(
                f"example does not fit task {name!r}: {type(network).__name__} does not take {_shapes(tensors)} "
                f"({type(error).__name__}: {first_line(error)}{place_in_code(error)})."
            ) from error
        if not given:
            raise ExportError(f"task {name!r} cannot be exported: its output has no tensors.")
        if not all(torch.isfinite(tensor).all() for _, tensor in given):
            raise ExportError(
                f"task {name!r} gives NaN or infinite values for the example, so that what is exported could not be "
                f"checked: give another example."
            )
        for called, _ in given:
            if called in taken:
                kinds = "both an input and an output" if called in tensors else "two outputs"
                raise InputError(f"{called!r} would be the name of {kinds}: rename the task, keyword or output.")
            taken.append(called)
        found[name] = dict(given)
    return found


def output_names(networks: Mapping[str, nn.Module], example: Example) -> dict[str, list[str]]:
    """By task, what its outputs are called; asked first, so that what does not fit is refused before the work.

    Raises:
        InputError, ExportError: as `outputs`.
    """
    return {task: list(each) for task, each in outputs(networks, example, example.tensors).items()}


def _shapes(tensors: dict[str, Tensor]) -> str:
    kinds = {name: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in tensors.items()}
    return ", ".join(f"{name} of {kind}" for name, kind in kinds.items())
