"""What the README shows works: its Python example runs, its pictures and pages exist, its commands are real."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from taskzip.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_there_is_one_example():
    assert len(EXAMPLES) == 1


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for package in ("sklearn", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[0], "README.md", "exec"), {"__name__": "readme"})
    assert "parameters apart" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["joint.onnx", "joint.safetensors"]
    command = re.search(r'^python -c "(.*?)"$', README, re.DOTALL | re.MULTILINE)
    assert command
    subprocess.run([sys.executable, "-c", command[1].replace("\\\n", "")], cwd=tmp_path, check=True)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)", PROSE))
def test_links_lead_somewhere(target: str):
    assert (ROOT / target).exists()


def test_the_commands_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= targets
    for options in re.findall(r"taskzip demo((?: --\w+)*)", README):
        for option in options.split():
            assert option in CliRunner().invoke(app, ["demo", "--help"]).output
