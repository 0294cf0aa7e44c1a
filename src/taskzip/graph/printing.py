"""Tables for people: at most 100 columns, with long names broken at dots and underscores."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

WIDTH = 100
_PIECE = re.compile(r"[^\s._]*[._]+|[^\s._]+|\s+")


def table(rows: Sequence[Sequence[str]], narrowest: Mapping[int, int], right: int | None = None) -> str:
    """Two spaces between columns; a cell that is too wide goes on in the next line.

    Args:
        rows: of cells, the head first.
        narrowest: the columns that may be made narrower, and how far.
        right: a column of numbers.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for wide, most in narrowest.items():
        free = WIDTH - 2 * (len(widths) - 1) - sum(widths) + widths[wide]
        widths[wide] = min(widths[wide], max(most, free))
    lines = []
    for row in rows:
        cells = [list(_wrapped(cell, width)) for cell, width in zip(row, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            padded = [
                part.rjust(width) if i == right else part.ljust(width)
                for i, (part, width) in enumerate(zip(parts, widths, strict=True))
            ]
            lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _wrapped(cell: str, width: int) -> Iterator[str]:
    """Lines of a cell; only what has neither a space, nor a dot or underscore, is cut anywhere."""
    line = ""
    for word in re.findall(r"\S+\s*", cell):
        if line and len(line + word.rstrip()) > width and len(word.rstrip()) <= width:
            yield line.rstrip()
            line = ""
        for piece in _PIECE.findall(word):
            if line and len(line + piece.rstrip()) > width:
                yield line.rstrip()
                line = ""
            while len(piece.rstrip()) > width:
                yield piece[:width]
                piece = piece[width:]
            line += piece
    if line.rstrip():
        yield line.rstrip()
