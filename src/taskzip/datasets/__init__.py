"""Data sets of the experiments, as plain tensors."""

from taskzip.datasets.digits import digits, quarter_turns
from taskzip.datasets.in_memory import batches
from taskzip.datasets.mnist import fashion_mnist, mnist

__all__ = ["batches", "digits", "fashion_mnist", "mnist", "quarter_turns"]
