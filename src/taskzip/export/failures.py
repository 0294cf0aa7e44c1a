"""Why a network cannot be exported, and at which of its lines, from what torch raises."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch.fx import Node

from taskzip.errors import first_line, line_in_code, place_in_code


def reason(error: BaseException) -> str:
    """The line that says what is wrong, from an error of torch.export, torch.onnx or the network itself."""
    import torch.onnx

    *_, innermost = _chain(error)
    # torch.onnx wraps what went wrong in advice on how to extend it.
    told = first_line(innermost if isinstance(error, torch.onnx.OnnxExporterError) else error)
    told = re.split(r"[.!;]? For more information|[.!;]? Failure message|[.!;]? See the stack trace", told)[0]
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


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
