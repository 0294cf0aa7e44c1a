"""MNIST and Fashion-MNIST from IDX files made here; the mirror is a folder on this machine."""

import gzip
import hashlib
import importlib
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from taskzip.datasets import fashion_mnist, mnist
from taskzip.errors import InputError

# Not `import ... as`: the package's attribute of that name is the function.
MODULE = importlib.import_module("taskzip.datasets.mnist")
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, size=(5, 28, 28), dtype=np.uint8)
LABELS = RNG.integers(0, 10, size=5, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


FILES = {
    f"{part}-{name}-ubyte": idx(array)
    for part in ("train", "t10k")
    for name, array in (("images-idx3", IMAGES), ("labels-idx1", LABELS))
}


def write(folder: Path, zipped: bool = True) -> Path:
    """Put the four files into a folder; returns the folder."""
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every download, so that no test can reach the real mirrors."""

    def refuse(url: str) -> bytes:
        raise OSError("no route to host")

    monkeypatch.setattr(MODULE, "_fetch", refuse)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror of the files above, for MNIST."""
    folder = write(tmp_path / "mirror")
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in FILES.items()}
    source = replace(MODULE._MNIST, mirror=f"{folder.as_uri()}/", md5=md5)
    monkeypatch.setattr(MODULE, "_MNIST", source)
    return folder


def assert_read(images: torch.Tensor, labels: torch.Tensor) -> None:
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    torch.testing.assert_close(images, torch.from_numpy(IMAGES).float()[:, None] / 255)
    assert labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("read", "folder"), [(mnist, "MNIST"), (fashion_mnist, "FashionMNIST")])
def test_reads_files_as_torchvision_lays_them_out(
    read: Callable, folder: str, split: str, zipped: bool, tmp_path: Path, offline: None
):
    write(tmp_path / folder / "raw", zipped)
    assert_read(*read(tmp_path, split=split))


def test_root_defaults_to_the_variable_then_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
):
    write(tmp_path / "data" / "MNIST" / "raw")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TASKZIP_DATA", str(tmp_path / "data"))
    assert_read(*mnist())
    monkeypatch.delenv("TASKZIP_DATA")
    with pytest.raises(InputError, match=r"\.cache/taskzip/MNIST/raw/train-images-idx3-ubyte\.gz is absent"):
        mnist()
    write(tmp_path / ".cache" / "taskzip" / "MNIST" / "raw")
    assert_read(*mnist())


def test_unknown_split_is_named():
    with pytest.raises(InputError, match="split='valid' is not one of 'train', 'test'"):
        mnist(split="valid")  # type: ignore[arg-type]


def test_absent_and_offline_names_path_variable_and_way_out(tmp_path: Path, offline: None):
    with pytest.raises(InputError) as caught:
        fashion_mnist(tmp_path, split="test")
    message = str(caught.value)
    path = "FashionMNIST/raw/t10k-images-idx3-ubyte.gz"
    assert message.startswith(f"{tmp_path / path} is absent and could not be downloaded from http")
    assert "no route to host" in message
    assert message.endswith("set TASKZIP_DATA to a folder that holds FashionMNIST/raw/t10k-images-idx3-ubyte.gz")


def test_downloads_what_is_absent_once(tmp_path: Path, mirror: Path):
    root = tmp_path / "root"
    assert_read(*mnist(root))
    raw = root / "MNIST" / "raw"
    assert sorted(p.name for p in raw.iterdir()) == [
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
    ]
    for path in mirror.iterdir():
        path.unlink()
    assert_read(*mnist(root))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (gzip.compress(idx(IMAGES[:4])), "md5"),
        (gzip.compress(idx(IMAGES))[:-9], "end-of-stream"),
        (b"<html>captive portal</html>", "gzip"),
    ],
)
def test_a_bad_download_leaves_nothing_behind(content: bytes, why: str, tmp_path: Path, mirror: Path):
    (mirror / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(InputError, match=rf"could not be downloaded from file://.*{why}"):
        mnist(tmp_path / "root")
    assert [p for p in tmp_path.joinpath("root").rglob("*") if p.is_file()] == []


def test_a_download_that_cannot_be_stored_leaves_nothing_behind(
    tmp_path: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match="disk full"):
        mnist(tmp_path / "root")
    assert [p for p in tmp_path.joinpath("root").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("train-images-idx3-ubyte", idx(IMAGES)[:-1], "announces 3920 bytes but holds 3919"),
        ("train-images-idx3-ubyte", idx(IMAGES)[:10], "header is incomplete"),
        ("train-images-idx3-ubyte", b"", "begins with 0x where"),
        ("train-images-idx3-ubyte", idx(LABELS), "begins with 0x00000801 where an IDX file has 0x00000803"),
        ("train-images-idx3-ubyte", idx(IMAGES[:, :14]), r"shape \(14, 28\), not \(28, 28\)"),
        ("train-labels-idx1-ubyte", idx(LABELS[:3]), "5 images but .* 3 labels"),
        ("train-images-idx3-ubyte.gz", gzip.compress(idx(IMAGES))[:-20], "cannot be unzipped"),
        ("train-images-idx3-ubyte.gz", b"not gzip", "cannot be unzipped"),
    ],
)
def test_torn_or_wrong_files_are_named(name: str, content: bytes, why: str, tmp_path: Path, offline: None):
    raw = write(tmp_path / "MNIST" / "raw", zipped=name.endswith(".gz"))
    (raw / name).write_bytes(content)
    with pytest.raises(InputError, match=why) as caught:
        mnist(tmp_path)
    assert str(raw / name) in str(caught.value)
