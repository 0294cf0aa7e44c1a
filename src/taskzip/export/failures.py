"""Why a network cannot be exported, and at which of its lines, from what torch raises."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from torch import nn
from torch.fx import Node

from taskzip.errors import ExportError, first_line, line_in_code, place_in_code
from taskzip.export.target import Unwritten


def reason(error: BaseException) -> str:
    """The line that says what is wrong, from an error of an exporter or the network itself."""
    import torch.onnx

    *_, innermost = _chain(error)
    # torch.onnx wraps what went wrong in advice on how to extend it.
    told = first_line(innermost if isinstance(error, torch.onnx.OnnxExporterError) else error)
    guard = re.search(r"^Constraints violated.*?^ *- (.+?)$", str(error), re.DOTALL | re.MULTILINE)
    if guard:
        told = f"it works for some sizes of batch only ({guard[1].strip()})"
    told = re.split(r"[.!;]? (?:For more information|Failure message|See the stack trace|\(https?://)", told)[0]
    return told if len(told) <= 300 else f"{told[:300]} ..."


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
    alone: Callable[[str, bool], object],
    dynamic: bool,
    way_out: str,
) -> ExportError:
    """Which task it is that cannot be exported: the first one that cannot by itself.

    Args:
        error: of exporting all of them.
        networks: by task.
        alone: exports one task, with batches of any size or not.
        dynamic: whether the batches were to be of any size.
        way_out: how to ask for one size of batch.
    """
    for name, network in networks.items():
        found = _refusal(alone, name, dynamic)
        if found is not None:
            why = f"task {name!r} cannot be exported: {type(network).__name__}: {reason(found)}{place(found)}."
            if dynamic and _refusal(alone, name, False) is None:
                why += f" For the example's size of batch alone it can: {way_out}."
            return ExportError(why)
    return ExportError(f"the tasks cannot be exported together, though each can alone: {reason(error)}.")


def _refusal(alone: Callable[[str, bool], object], name: str, dynamic: bool) -> Exception | None:
    try:
        alone(name, dynamic)
    except Unwritten:
        return None
    except Exception as error:  # torch raises whatever the network raises, and a dozen classes of its own
        return error
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
