"""One thread and the same random numbers for every test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # for `from twin import ...`: the import mode leaves the path alone

settings.register_profile("taskzip", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("taskzip")


def pytest_configure() -> None:
    # The networks here are tiny: on two cores a second thread makes a zip 2 to 10 times slower (80 ms with one thread).
    torch.set_num_threads(1)
    torch.manual_seed(0)  # for what test modules draw when they are imported


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
