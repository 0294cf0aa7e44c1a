"""VGG-16 of Simonyan and Zisserman 2015, with torchvision's layout and names."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from taskzip.errors import InputError

WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
_LAST_OF_STAGE = (1, 3, 6, 9, 12)  # the convolutions before a pooling, counted from 0


class VGG16(nn.Module):
    """Thirteen 3x3 convolutions in five stages, each with max-pooling behind it, and three linear layers.

    Parameters are named as in torchvision (``features.0.weight`` to ``classifier.6.bias``), so that the state dict
    of its ``vgg16``, or ``vgg16_bn`` with ``batch_norm=True``, loads.

    K. Simonyan, A. Zisserman, *Very Deep Convolutional Networks for Large-Scale Image Recognition*, ICLR 2015
    (arXiv:1409.1556).

    Args:
        classes: number of outputs.
        in_channels: channels of the images.
        widths: units of the thirteen convolutions.
        hidden: units of the first and the second linear layer.
        batch_norm: put batch-norm behind every convolution.
        dropout: the chance that a unit of the linear layers is left out in training.

    Raises:
        InputError: if ``widths`` are not thirteen, or a size is not positive.
    """

    def __init__(
        self,
        classes: int = 1000,
        in_channels: int = 3,
        widths: Sequence[int] = WIDTHS,
        hidden: int = 4096,
        batch_norm: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        _check_sizes(classes, in_channels, widths, hidden)
        self.features = nn.Sequential(*_convolutions(in_channels, widths, batch_norm))
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(widths[-1] * 7 * 7, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return logits for ``images`` of ``[batch, in_channels, height, width]``, of at least 32x32."""
        x = self.avgpool(self.features(images))
        return self.classifier(torch.flatten(x, 1))


def _convolutions(in_channels: int, widths: Sequence[int], batch_norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for number, (width_in, width) in enumerate(zip((in_channels, *widths[:-1]), widths, strict=True)):
        layers.append(nn.Conv2d(width_in, width, kernel_size=3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU())
        if number in _LAST_OF_STAGE:
            layers.append(nn.MaxPool2d(2))
    return layers


def _check_sizes(classes: int, in_channels: int, widths: Sequence[int], hidden: int) -> None:
    if len(widths) != len(WIDTHS):
        raise InputError(f"VGG16 has {len(WIDTHS)} convolutions, but widths has {len(widths)} numbers")
    if min(classes, in_channels, hidden, *widths) < 1:
        raise InputError(
            f"classes={classes}, in_channels={in_channels}, widths={tuple(widths)} and hidden={hidden} "
            "must all be at least 1"
        )
