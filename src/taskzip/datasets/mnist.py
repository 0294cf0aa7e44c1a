"""MNIST and Fashion-MNIST as two tensors, read from the IDX files that torchvision also uses.

Below a data root lie ``MNIST/raw/`` and ``FashionMNIST/raw/`` with four files each, gzipped or not. What is
absent is downloaded once and checked. The root is the argument, else ``$TASKZIP_DATA``, else
``~/.cache/taskzip``.
"""

import gzip
import hashlib
import http.client
import math
import os
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from taskzip.errors import InputError
from taskzip.files import replacing

Split = Literal["train", "test"]
Images = Float[Tensor, "n 1 28 28"]
Labels = Int64[Tensor, " n"]

_TIMEOUT = 30.0  # seconds without a byte before a download counts as failed
_PREFIXES = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class _Source:
    """Where a data set lies: its folder below the root, its mirror, and the md5 of each file, unzipped.

    The checksum is that of the content because mirrors compress the same bytes differently.
    """

    folder: str
    mirror: str
    md5: dict[str, str]


_MNIST = _Source(
    folder="MNIST",
    mirror="https://ossci-datasets.s3.amazonaws.com/mnist/",
    md5={
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
)
_FASHION_MNIST = _Source(
    folder="FashionMNIST",
    mirror="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    md5={
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
)


def mnist(root: str | Path | None = None, split: Split = "train") -> tuple[Images, Labels]:
    """Return the handwritten digits of MNIST (LeCun, Cortes, Burges; CC BY-SA 3.0).

    Args:
        root: folder that holds ``MNIST/raw``; by default ``$TASKZIP_DATA``, else ``~/.cache/taskzip``.
        split: ``"train"`` (60,000 images) or ``"test"`` (10,000).

    Returns:
        Images, float32 ``[n, 1, 28, 28]`` in [0, 1], and labels, int64 ``[n]`` in 0..9.

    Raises:
        InputError: if ``split`` is unknown, a file is absent and cannot be downloaded, or a file is torn or
            is no IDX file of 28x28 images and their labels.
    """
    return _load(_MNIST, root, split)


def fashion_mnist(root: str | Path | None = None, split: Split = "train") -> tuple[Images, Labels]:
    """Return the clothes of Fashion-MNIST (Xiao, Rasul, Vollgraf 2017; Zalando, MIT).

    Args:
        root: folder that holds ``FashionMNIST/raw``; by default ``$TASKZIP_DATA``, else ``~/.cache/taskzip``.
        split: ``"train"`` (60,000 images) or ``"test"`` (10,000).

    Returns:
        Images, float32 ``[n, 1, 28, 28]`` in [0, 1], and labels, int64 ``[n]`` in 0..9.

    Raises:
        InputError: if ``split`` is unknown, a file is absent and cannot be downloaded, or a file is torn or
            is no IDX file of 28x28 images and their labels.
    """
    return _load(_FASHION_MNIST, root, split)


def _load(source: _Source, root: str | Path | None, split: str) -> tuple[Images, Labels]:
    if split not in _PREFIXES:
        raise InputError(f"split={split!r} is not one of {', '.join(map(repr, _PREFIXES))}")
    raw = _data_root(root) / source.folder / "raw"
    images_file = _locate(raw, f"{_PREFIXES[split]}-images-idx3-ubyte", source)
    labels_file = _locate(raw, f"{_PREFIXES[split]}-labels-idx1-ubyte", source)
    images, labels = _read_idx(images_file, (28, 28)), _read_idx(labels_file, ())
    if len(images) != len(labels):
        raise InputError(f"{images_file} holds {len(images)} images but {labels_file} {len(labels)} labels")
    return torch.from_numpy(images).float().div_(255).unsqueeze(1), torch.from_numpy(labels).long()


def _data_root(root: str | Path | None) -> Path:
    return Path(root or os.environ.get("TASKZIP_DATA") or "~/.cache/taskzip").expanduser()


def _locate(raw: Path, name: str, source: _Source) -> Path:
    """The path of the file, zipped or not; downloaded if neither is there."""
    for path in (raw / name, raw / f"{name}.gz"):
        if path.is_file():
            return path
    return _download(raw / f"{name}.gz", source.mirror, source.md5[name])


def _read_idx(path: Path, item: tuple[int, ...]) -> np.ndarray:
    """Parse an IDX file of unsigned bytes: magic, one big-endian size per axis, then the bytes.

    ``item`` is the shape of one entry; the result is uint8 ``[n, *item]``.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _broken(path, f"it cannot be unzipped ({error})") from error
    axes = 1 + len(item)
    magic = bytes((0, 0, 8, axes))  # 8: unsigned bytes
    if content[:4] != magic:
        raise _broken(path, f"it begins with 0x{content[:4].hex()} where an IDX file has 0x{magic.hex()}")
    start = 4 + 4 * axes
    if len(content) < start:
        raise _broken(path, "its header is incomplete")
    shape = tuple(np.frombuffer(content, dtype=">i4", count=axes, offset=4).tolist())
    if shape[1:] != item:
        raise _broken(path, f"its entries have shape {shape[1:]}, not {item}")
    if len(content) - start != math.prod(shape):
        raise _broken(path, f"it announces {math.prod(shape)} bytes but holds {len(content) - start}")
    # A copy, because torch wants memory that it may write to.
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()


def _broken(path: Path, why: str) -> InputError:
    return InputError(f"{path} is damaged or not the right file: {why}; delete it to download it again")


def _download(path: Path, mirror: str, md5: str) -> Path:
    """Fetch ``mirror + path.name`` to ``path``; the file appears whole and checked, or not at all."""
    url = mirror + path.name
    try:
        zipped = _fetch(url)
        _check(zipped, md5)
        _write_atomically(path, zipped)
    except (OSError, EOFError, zlib.error, http.client.HTTPException) as error:
        raise InputError(
            f"{path} is absent and could not be downloaded from {url} ({error}): put the file there, or set "
            f"TASKZIP_DATA to a folder that holds {path.parent.parent.name}/raw/{path.name}"
        ) from error
    return path


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as reply:
        content: bytes = reply.read()
    return content


def _check(zipped: bytes, md5: str) -> None:
    found = hashlib.md5(gzip.decompress(zipped), usedforsecurity=False).hexdigest()
    if found != md5:
        raise OSError(f"its content has md5 {found}, not {md5}")


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_bytes(content)
