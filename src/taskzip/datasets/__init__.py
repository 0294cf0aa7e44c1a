"""Data sets of the experiments, as plain tensors."""

from taskzip.datasets.mnist import fashion_mnist, mnist

__all__ = ["fashion_mnist", "mnist"]
