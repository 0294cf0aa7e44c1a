"""Data sets of the experiments, as plain tensors."""

from taskzip.datasets.in_memory import batches
from taskzip.datasets.mnist import fashion_mnist, mnist

__all__ = ["batches", "fashion_mnist", "mnist"]
