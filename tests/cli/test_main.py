"""`python -m taskzip` is the command line."""

import runpy
import subprocess
import sys

import pytest

import taskzip as tz


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "taskzip", *arguments], capture_output=True, text=True, check=False)


def test_as_a_process() -> None:
    version = run("--version")
    assert (version.returncode, version.stdout) == (0, f"taskzip {tz.__version__}\n")


def test_it_has_the_commands_and_their_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, code, said in (["--help"], 0, "reproduce"), (["unknown"], 2, "No such command 'unknown'"):
        monkeypatch.setattr(sys, "argv", ["taskzip", *arguments])
        with pytest.raises(SystemExit) as left:
            runpy.run_module("taskzip", run_name="__main__")
        assert left.value.code == code
        captured = capsys.readouterr()
        assert said in captured.out + captured.err


def test_importing_it_runs_nothing() -> None:
    runpy.run_module("taskzip.__main__")
