"""Exporters without what they say of packages that nobody asked for, and of their own code."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

_TALKATIVE = ("torch.onnx", "torch.export", "torch.fx", "onnx_ir", "torch.utils._pytree", "torchao")


@contextmanager
def quietly() -> Iterator[None]:
    """Exporters log nothing, warnings of coming changes are not shown, and no package takes hold of all logging."""
    levels = {logger: logger.level for logger in map(logging.getLogger, _TALKATIVE)}
    handlers = list(logging.root.handlers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        # Of what a network keeps of its last call; that is put back, and no part of what is exported.
        warnings.filterwarnings("ignore", r"The tensor attributes? self\..* assigned during export", UserWarning)
        try:
            for logger in levels:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)
            logging.root.handlers[:] = handlers


@contextmanager
def without_graph() -> Iterator[None]:
    """When torch cannot follow a network it prints all of the graph so far: that is left out of what is printed."""
    if sys.stderr is None:  # as in programs without a terminal
        yield
        return
    said, graph = io.StringIO(), ""
    try:
        with redirect_stderr(said):
            yield
    except Exception as error:
        graph = f"{getattr(error, 'partial_fx_graph', '')}\n"
        raise
    finally:
        sys.stderr.write(said.getvalue().replace(graph, "") if graph.strip() else said.getvalue())
