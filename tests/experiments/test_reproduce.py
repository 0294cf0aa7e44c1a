"""`taskzip reproduce`, on small data and with short training: its files, its words, and going on after a kill."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from taskzip.cli import app
from taskzip.experiments import fig2, methods, networks, table1

pytest.importorskip("matplotlib")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_fig2_has_every_point_and_its_ends_in_a_table(tmp_path: Path) -> None:
    result = run("fig2", "--out", tmp_path, "--every", "150")
    assert result.exit_code == 0, result.output
    points = rows(tmp_path / "fig2.csv")
    found = {(p["layer"], int(p["shared"])) for p in points}
    assert found == {("fc1", 0), ("fc1", 150), ("fc1", 300), ("fc2", 0), ("fc2", 75), ("fc2", 100)}
    assert len(points) == 3 * len(found)
    assert (tmp_path / "fig2.png").read_bytes().startswith(b"\x89PNG")

    def mean(layer: str, shared: int, method: str) -> float:
        key = (layer, str(shared), method)
        return next(
            (float(p["error_a"]) + float(p["error_b"])) / 2
            for p in points
            if (p["layer"], p["shared"], p["method"]) == key
        )

    alone = mean("fc1", 0, "random pairs")
    assert len({mean("fc1", 0, method) for method in fig2.METHODS}) == 1  # where nothing is shared nothing changes
    for method in fig2.METHODS:
        assert mean("fc1", 300, method) == mean("fc2", 0, method)
        ends = [f"{mean(*end, method) - alone:+.2f}" for end in (("fc1", 300), ("fc2", 100))]
        assert f"| {method} | {ends[0]} | {ends[1]} |" in result.stdout


def test_fig2_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, calls = fig2._errors, []

    def killed(*arguments: object) -> tuple[float, float]:
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(arguments)
        return measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fig2, "_errors", killed)
    result = run("fig2", "--out", tmp_path, "--every", "300")
    assert result.exit_code == 130 and "interrupted" in result.output
    assert len(rows(tmp_path / "fig2.csv")) == 4
    monkeypatch.setattr(fig2, "_errors", lambda *arguments: calls.append(arguments) or measure(*arguments))
    result = run("fig2", "--out", tmp_path, "--every", "300")
    assert result.exit_code == 0, result.output
    assert len(calls) == len(rows(tmp_path / "fig2.csv")) == 12
    assert "training" not in result.stderr


def test_table1_stands_beside_the_paper_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(table1.PAPER) == [(kind, sparse) for kind in ("lenet300", "lenet5") for sparse in (False, True)]
    few = {key: paper._replace(iterations=2) for key, paper in table1.PAPER.items() if key[0] == "lenet300"}
    monkeypatch.setattr(table1, "PAPER", few)
    monkeypatch.setattr(networks, "PRUNED_RETRAINING", networks.Retraining(2, loss="distill"))
    result = run("table1", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    lines = [line for line in (tmp_path / "table1.md").read_text().splitlines() if "LeNet" in line]
    assert [line.split("|")[1].strip() for line in lines] == [
        "LeNet-300-100, dense",
        "LeNet-300-100, sparse",
    ]
    assert all(line in result.stdout for line in lines)
    assert [cell.strip() for cell in lines[0].split("|")[-5:-1]] == ["1.57", "1.60", "1.64", "+0.05"]


@pytest.mark.parametrize("case", ["lenet300", "mnist-fashion"])
def test_methods_has_a_row_for_each_step(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "SEEDS", 2)
    monkeypatch.setattr(methods, "LATER", [(1, "labels"), (2, "distill")])
    if case == "mnist-fashion":  # convolutions take their time
        monkeypatch.setattr(methods, "SHARES", (1.0,))
        monkeypatch.setattr(
            methods, "STEPS", {name: options for name, options in methods.STEPS.items() if name in methods.RETRAINED}
        )
    result = run("methods", case, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    text = (tmp_path / f"methods-{case}.md").read_text()
    assert text.strip() in result.stdout
    whole, *partly = text.split("\n\n")
    assert [line.split(" | ")[0][2:] for line in whole.splitlines()[2:]] == [*methods.RIVALS, *methods.STEPS]
    for table in partly:
        assert [line.split(" | ")[0][2:] for line in table.splitlines()[2:]] == [*methods.STEPS]
    assert len(partly) == len(methods.SHARES) - 1
    default = whole.splitlines()[-1]
    assert len(re.findall(r"[+-]\d+\.\d\d ± \d+\.\d\d", default)) == 1 + len(methods.LATER)
    again = run("methods", case, "--out", tmp_path)
    assert again.exit_code == 0 and again.stdout == result.stdout and not again.stderr.strip()


def test_a_foreign_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "fig2.csv").write_text("something else\n")
    result = run("fig2", "--out", tmp_path)
    assert result.exit_code == 1 and "move it away" in result.stderr and "Traceback" not in result.output


def test_unknown_case_is_a_usage_error(tmp_path: Path) -> None:
    assert run("methods", "vgg", "--out", tmp_path).exit_code == 2
