"""Where an exported file goes: refused before the work and not after it, and all or nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taskzip.errors import ExportError
from taskzip.files import replacing

# Too long a name; links that lead in a circle; something that is no path.
_NO_PATH = (OSError, RuntimeError, TypeError, ValueError)


class Unwritten(ExportError):
    """A file that could not be written, which is the fault of no task."""


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
    except _NO_PATH as error:
        raise ExportError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}.") from error
    for place in (target.parent, target):
        if place.exists() and not os.access(place, os.W_OK):
            what = "folder" if place.is_dir() else "file"
            raise ExportError(f"cannot write {path}: the {what} {place} is not writable.")
    return target


@contextmanager
def writing(path: str | Path, target: Path) -> Iterator[Path]:
    """As `replacing` the target, which is called by the path that was given.

    Raises:
        Unwritten: the system refuses; nothing is left behind.
    """
    with on_disk(path), replacing(target) as part:
        yield part


@contextmanager
def on_disk(path: str | Path) -> Iterator[None]:
    """Say what the system refuses.

    Raises:
        Unwritten: it refuses.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        ask = "Has it room?" if full else "Is the folder writable?"
        raise Unwritten(f"cannot write {path}: {error.strerror or error}. {ask}") from error
