"""Measured numbers in a CSV file, written one by one, so that a run that was killed goes on where it was."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from taskzip.errors import InputError
from taskzip.files import replacing

Key = tuple[str, ...]
Values = tuple[float, ...]


class Results:
    """Numbers by what they are of.

    Args:
        path: the file; read if it is there, its folder made if it is not.
        keys: titles of the columns that say what was measured.
        values: titles of the columns of numbers.

    Raises:
        InputError: there is such a file with other columns.
    """

    def __init__(self, path: Path, keys: Sequence[str], values: Sequence[str]) -> None:
        self.path = path
        self._titles = [*keys, *values]
        self._keys = len(keys)
        self.found: dict[Key, Values] = {}
        if path.exists():
            self._read()
        path.parent.mkdir(parents=True, exist_ok=True)

    def of(self, key: Key, measure: Callable[[], Values]) -> Values:
        """The numbers for this key; measured, and written, if they are not known yet."""
        if key not in self.found:
            self.found[key] = measure()
            self._write()
        return self.found[key]

    def _read(self) -> None:
        with self.path.open(newline="") as file:
            titles, *rows = list(csv.reader(file)) or [[]]
        if titles != self._titles or any(len(row) != len(titles) for row in rows):
            raise InputError(f"{self.path} is no file of this experiment: move it away, or choose another --out.")
        self.found = {tuple(row[: self._keys]): tuple(map(float, row[self._keys :])) for row in rows}

    def _write(self) -> None:
        with replacing(self.path) as part, part.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(self._titles)
            rows.writerows([*key, *(f"{value:.6g}" for value in values)] for key, values in self.found.items())
