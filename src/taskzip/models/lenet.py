"""The two LeNets of the paper's Section 4: LeNet-300-100 (dense) and LeNet-5 (convolutional, as in Caffe)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from taskzip.errors import InputError


class LeNet300(nn.Module):
    """LeNet-300-100: three linear layers ``fc1``, ``fc2``, ``fc3`` with ReLU between them.

    Args:
        in_features: values per image, 784 for 28x28 grey images.
        classes: number of outputs.
        hidden: units of ``fc1`` and ``fc2``.
    """

    def __init__(self, in_features: int = 784, classes: int = 10, hidden: tuple[int, int] = (300, 100)) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], classes)

    def forward(self, images: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Return logits; ``images`` are ``[batch, in_features]`` or any shape that flattens to it."""
        x = images.flatten(1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class LeNet5(nn.Module):
    """LeNet-5 with the layer sizes of Caffe: ``conv1``, ``conv2`` (5x5, each pooled by 2), ``fc1``, ``fc2``.

    ReLU follows every hidden layer. (Caffe's own network has none after the convolutions.)

    Args:
        in_channels: channels of the images.
        classes: number of outputs.
        widths: units of ``conv1``, ``conv2`` and ``fc1``.
        image_size: height and width of the images, at least 16.

    Raises:
        InputError: if ``image_size`` is so small that nothing is left after the second pooling.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 10,
        widths: tuple[int, int, int] = (20, 50, 500),
        image_size: int = 28,
    ) -> None:
        super().__init__()
        if image_size < 16:
            raise InputError(f"LeNet5 needs images of at least 16x16, not image_size={image_size}")
        side = ((image_size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, widths[0], kernel_size=5)
        self.conv2 = nn.Conv2d(widths[0], widths[1], kernel_size=5)
        self.fc1 = nn.Linear(widths[1] * side * side, widths[2])
        self.fc2 = nn.Linear(widths[2], classes)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return logits for ``images`` of ``[batch, in_channels, image_size, image_size]``."""
        x = F.relu(F.max_pool2d(self.conv1(images), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(x)
