"""Where an exported file goes: refused before the work and not after it, and all or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taskzip.errors import ExportError
from taskzip.files import replacing


def writable(path: str | Path) -> Path:
    """Where a symbolic link points, instead of replacing the link.

    Raises:
        ExportError: nothing can be written there.
    """
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


@contextmanager
def writing(path: str | Path, target: Path) -> Iterator[Path]:
    """As `replacing` the target, which is called by the path that was given.

    Raises:
        ExportError: the system refuses; nothing is left behind.
    """
    try:
        with replacing(target) as part:
            yield part
    except OSError as error:
        raise ExportError(
            f"cannot write {path}: {error.strerror or error}. Is the folder writable, and has it room?"
        ) from error
