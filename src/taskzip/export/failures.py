"""Why a network cannot be exported, and at which of its lines, from what torch raises."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from torch import nn
from torch.fx import Node

from taskzip.errors import ExportError, first_line, line_in_code, place_in_code
from taskzip.export.dynamic import Axes, described, one_by_one
from taskzip.export.target import Unwritten


def reason(error: BaseException) -> str:
    """The line that says what is wrong, from an error of an exporter or the network itself."""
    import torch.onnx

    *_, innermost = _chain(error)
    # torch.onnx wraps what went wrong in advice on how to extend it.
    told = first_line(innermost if isinstance(error, torch.onnx.OnnxExporterError) else error)
    told = _sizes(str(error)) or told
    told = re.split(r"[.!;]? (?:For more information|Failure message|See the stack trace|\(https?://)", told)[0]
    return told if len(told) <= 300 else f"{told[:300]} ..."


def _sizes(message: str) -> str:
    """For which sizes a network works, where torch says so; else ""."""
    guard = re.search(r"^Constraints violated.*?^ *- (.+?)\.?(?: If you're .*)?$", message, re.DOTALL | re.MULTILINE)
    if not guard:
        return ""
    fixes = re.search(r"^Suggested fixes:\n((?:  .+\n)+)", message, re.MULTILINE)
    told = "; ".join(line.strip() for line in fixes[1].splitlines()) if fixes else guard[1]
    for dim, source in set(re.findall(r"(\w+) = (L\[\S+\.size\(\)\[\d+\])", told)):
        told = told.replace(f"{dim} = {source}", dim).replace(source, dim)
    return f"it works for some sizes only ({told})"


def place(error: BaseException) -> str:
    """The line of the user's code, to be added to a message; "" where neither traceback nor graph has one."""
    for each in _chain(error):
        traceback = each.__traceback__
        while traceback is not None:
            node = traceback.tb_frame.f_locals.get("node")  # which torch.onnx was translating
            if isinstance(node, Node) and (line := line_in_code(node.meta.get("stack_trace") or "")):
                return line
            traceback = traceback.tb_next
    return place_in_code(error)


def explained(
    error: Exception,
    networks: Mapping[str, nn.Module],
    alone: Callable[[str, Axes], object],
    axes: Axes,
    way_out: str | None,
) -> ExportError:
    """Which task it is that cannot be exported: the first one that cannot by itself.

    Args:
        error: of exporting all of them.
        networks: by task.
        alone: exports one task, with axes of any size.
        axes: which were to be of any size.
        way_out: how to ask for one size of batch; None where the user chose the axes.
    """
    for name, network in networks.items():
        found, advice = _refusal(alone, name, axes), ""
        if found is None:
            continue
        if axes and _refusal(alone, name, {}) is None:
            advice = f" For the example's size of batch alone it can: {way_out}."
            if way_out is None:
                which, found = _blamed(alone, name, axes, found)
                advice = (
                    f" For the example's size it can: leave {described(which)} out of dynamic_shapes, or give its Dim "
                    f"the min and max between which every size works."
                )
        why = f"task {name!r} cannot be exported: {type(network).__name__}: {reason(found)}{place(found)}."
        return ExportError(why + advice)
    return ExportError(f"the tasks cannot be exported together, though each can alone: {reason(error)}.")


def _blamed(alone: Callable[[str, Axes], object], name: str, axes: Axes, error: Exception) -> tuple[Axes, Exception]:
    """The first dimension that cannot change by itself, and what is said then; all of them where each can."""
    for dim in one_by_one(axes):
        found = _refusal(alone, name, dim)
        if found is not None:
            return dim, found
    return axes, error


def _refusal(alone: Callable[[str, Axes], object], name: str, axes: Axes) -> Exception | None:
    try:
        alone(name, axes)
    except Unwritten:
        return None
    except Exception as error:  # torch raises whatever the network raises, and a dozen classes of its own
        return error
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
