"""What docs/device.md shows works: its Python runs from top to bottom, section by section, and gives what it says."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/device.md").read_text()

BEFORE = """
import os

import onnxruntime
import torch

import taskzip as tz
from taskzip.models import SmallCNN

torch.manual_seed(0)
images = torch.rand(256, 1, 8, 8)
tasks = [tz.Task("digit", SmallCNN(10).eval(), [images]), tz.Task("turn", SmallCNN(4).eval(), [images])]
zipped = tz.zip(tasks, share=0.75, progress=False)
original = {name: zipped[name](images).detach().numpy() for name in zipped}


def far(file, **options):
    session = onnxruntime.InferenceSession(file, **options)
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True))
    return max(abs(y - original[name]).max() / abs(original[name]).max() for name, y in found.items())
"""

AFTER = {
    "ONNX Runtime": """
assert far("small.onnx", sess_options=options) < 1e-4
assert far("digit.onnx", sess_options=options) < 1e-4 and far("turn.onnx", sess_options=options) < 1e-4
assert os.path.getsize("small.onnx.data") < 1.05 * 4 * zipped.parameter_count()
assert os.path.getsize("digit.onnx") < 20_000
""",
    "Quantisation": """
assert far("static.onnx") < 0.05 and far("dynamic.onnx") < 0.05
for file in ("static.onnx", "dynamic.onnx"):  # in a network so small most bytes are nodes
    assert os.path.getsize(file) < 0.7 * os.path.getsize("joint.onnx")
""",
}


def blocks(section: str) -> list[str]:
    """The Python of a section."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(code: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BEFORE + code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(autouse=True)
def _installed() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


def test_the_least_memory(tmp_path: Path) -> None:
    found = blocks("ONNX Runtime")
    assert len(found) == 3
    run("\n".join([found[0], *found, AFTER["ONNX Runtime"]]), tmp_path)  # what is there is written anew


def test_onnx_runtime_in_8_bits(tmp_path: Path) -> None:
    found = [block for block in blocks("Quantisation") if "torchao" not in block]
    assert len(found) == 2
    run("\n".join([blocks("ONNX Runtime")[0], *found, AFTER["Quantisation"]]), tmp_path)


def test_torchao_in_8_bits(tmp_path: Path) -> None:
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    (found,) = [block for block in blocks("Quantisation") if "torchao" in block]
    run(found + "\nassert 0 < far('torchao.onnx') < 0.05\n", tmp_path)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)", PAGE))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / "docs" / target).exists()
