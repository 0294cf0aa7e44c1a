"""Layers by name: a dict by layer name also takes globs, such as "encoder.*"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from taskzip.errors import InputError

T = TypeVar("T")


def key_of(layer: str, by_name: Mapping[str, T]) -> str | None:
    """The key that says something of a layer, or None.

    The layer's own name goes before every glob; of several globs the one with most characters that are no wildcards
    counts, and of equals the last.
    """
    if layer in by_name:
        return layer
    matching = [key for key in by_name if isinstance(key, str) and fnmatchcase(layer, key)]
    return max(reversed(matching), key=_plain_characters, default=None)


def check_names(argument: str, named: Iterable[str], known: Sequence[str]) -> None:
    """Whether every name is that of a layer, or a glob that matches one.

    Raises:
        InputError: one that is not, with the names of the layers.
    """
    for name in named:
        if name not in known and not (isinstance(name, str) and any(fnmatchcase(layer, name) for layer in known)):
            raise InputError(f"{argument} names layer {name!r}; the layers that can be named are {', '.join(known)}.")


def _plain_characters(glob: str) -> int:
    return sum(character not in "*?" for character in glob)
