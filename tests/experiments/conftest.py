"""A small MNIST and a small Fashion-MNIST: blurred blobs of ten kinds, as IDX files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from taskzip.experiments import methods, networks, pairs


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def blobs(count: int, patterns: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    labels = rng.integers(0, 10, size=count)
    noisy = patterns[labels] + 0.3 * rng.normal(size=(count, 28, 28))
    return (255 * np.clip(noisy, 0, 1)).astype(np.uint8), labels.astype(np.uint8)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("MNIST", "FashionMNIST")):
        rng = np.random.default_rng(seed)
        patterns = np.stack([gaussian_filter(rng.normal(size=(28, 28)), 3) for _ in range(10)])
        patterns = patterns / patterns.max(axis=(1, 2), keepdims=True)
        raw = root / name / "raw"
        raw.mkdir(parents=True)
        for split, count in (("train", 640), ("t10k", 200)):
            images, labels = blobs(count, patterns, rng)
            (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
            (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    return root


@pytest.fixture(autouse=True)
def small(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the small data, and train for as long as they need."""
    monkeypatch.setenv("TASKZIP_DATA", str(data))
    monkeypatch.setattr(networks, "ITERATIONS", {"lenet300": 40, "lenet5": 40})
    monkeypatch.setattr(methods, "LATER", [(2, "labels"), (2, "distill")])
    monkeypatch.setattr(pairs, "IMAGES", 100)
