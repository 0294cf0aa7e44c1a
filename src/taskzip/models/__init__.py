"""Small reference networks of the paper's experiments."""

from taskzip.models.lenet import LeNet5, LeNet300

__all__ = ["LeNet5", "LeNet300"]
