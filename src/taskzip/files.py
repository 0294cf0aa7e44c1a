"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write to the path that this gives; at the end it takes the place of `path`, unless an error came before.

    Its name is its own, so that two processes that write the same file do not write into one another's. A file that
    was there before leaves its permissions to the new one.
    """
    path = Path(path)
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield part
        if path.exists():
            shutil.copymode(path, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Put files into the folder that this gives; at the end they go to `folder`, unless an error came before.

    A new folder appears whole. In one that exists, files of the same names are replaced one after another, which needs
    no room any more, and others stay.
    """
    exists = folder.is_dir()
    part = (folder if exists else folder.parent) / f".{folder.name}.{uuid.uuid4().hex}.part"
    part.mkdir()
    try:
        yield part
        if exists:
            for file in list(part.iterdir()):
                os.replace(file, folder / file.name)
        else:
            os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
