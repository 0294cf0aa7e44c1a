"""Small reference networks of the paper's experiments."""

from taskzip.models.lenet import LeNet5, LeNet300
from taskzip.models.small_cnn import SmallCNN

__all__ = ["LeNet5", "LeNet300", "SmallCNN"]
