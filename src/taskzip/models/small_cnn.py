"""The network of the demonstration: two convolutions and two linear layers, for images as small as 8x8."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Layers ``conv1``, ``conv2`` (3x3, padded), 2x2 max-pooling, ``fc1``, ``fc2``, with ReLU between them.

    Args:
        classes: number of outputs.
        in_channels: channels of the images.
        widths: units of ``conv1``, ``conv2`` and ``fc1``.
        image_size: height and width of the images.
    """

    def __init__(
        self,
        classes: int = 10,
        in_channels: int = 1,
        widths: tuple[int, int, int] = (16, 32, 24),
        image_size: int = 8,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(widths[0], widths[1], kernel_size=3, padding=1)
        self.fc1 = nn.Linear(widths[1] * (image_size // 2) ** 2, widths[2])
        self.fc2 = nn.Linear(widths[2], classes)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return logits for ``images`` of ``[batch, in_channels, image_size, image_size]``."""
        x = F.relu(self.conv1(images))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(x)
