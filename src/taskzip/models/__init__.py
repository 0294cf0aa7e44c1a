"""Reference networks: those of the paper's experiments, and others of their kind."""

from taskzip.models.lenet import LeNet5, LeNet300
from taskzip.models.resnet import ResNet18, ResNet20, ResNet28
from taskzip.models.small_cnn import SmallCNN
from taskzip.models.vgg import VGG16

__all__ = ["VGG16", "LeNet5", "LeNet300", "ResNet18", "ResNet20", "ResNet28", "SmallCNN"]
