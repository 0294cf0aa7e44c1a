"""Numbers in a CSV file: measured once, there again, and a foreign file is not overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

import taskzip as tz
from taskzip.experiments.results import Results


def test_what_is_known_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.csv"
    results = Results(path, ["layer", "shared"], ["error"])
    assert results.of(("fc1", "10"), lambda: (1.25,)) == (1.25,)
    assert path.read_text().splitlines() == ["layer,shared,error", "fc1,10,1.25"]
    again = Results(path, ["layer", "shared"], ["error"])
    assert again.of(("fc1", "10"), lambda: pytest.fail("measured again")) == (1.25,)
    again.of(("fc1", "20"), lambda: (2.0,))
    assert Results(path, ["layer", "shared"], ["error"]).found == {("fc1", "10"): (1.25,), ("fc1", "20"): (2.0,)}


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "layer,shared,error\nfc1\n"])
def test_a_foreign_file_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file.csv"
    path.write_text(content)
    with pytest.raises(tz.InputError, match="no file of this experiment"):
        Results(path, ["layer", "shared"], ["error"])
    assert path.read_text() == content


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.csv"
    results = Results(path, ["k"], ["error"])
    results.of(("a",), lambda: (1.0,))
    before = path.read_bytes()
    monkeypatch.setattr("taskzip.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        results.of(("b",), lambda: (2.0,))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["file.csv"]
