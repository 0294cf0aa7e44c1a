"""Exporters without what they say of packages that nobody asked for, and of their own code."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_TALKATIVE = ("torch.onnx", "onnx_ir", "torch.utils._pytree", "torchao")


@contextmanager
def quietly() -> Iterator[None]:
    """Only errors are logged, warnings of coming changes are not shown, and no package takes hold of all logging."""
    levels = {logger: logger.level for logger in map(logging.getLogger, _TALKATIVE)}
    handlers = list(logging.root.handlers)
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
            logging.root.handlers[:] = handlers
