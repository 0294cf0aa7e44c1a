"""Residual networks for small images: ResNet-18 and ResNet-20 of He et al. 2016, and ResNet-28.

K. He, X. Zhang, S. Ren, J. Sun, *Deep Residual Learning for Image Recognition*, CVPR 2016 (arXiv:1512.03385). The
experiments with ResNet-28 in the paper's Section 4.3 follow S.-A. Rebuffi, H. Bilen, A. Vedaldi, *Learning Multiple
Visual Domains with Residual Adapters*, NeurIPS 2017 (arXiv:1705.08045); the widths are theirs.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from taskzip.errors import InputError


class ResNet(nn.Module):
    """A 3x3 convolution, groups of basic blocks, the mean over all positions, and a linear layer.

    The layers are ``conv1`` and ``bn1``, then ``group1``, ``group2``, ... of blocks ``0``, ``1``, ..., each
    with ``conv1``, ``bn1``, ``conv2``, ``bn2`` and, where the shape changes, ``shortcut.conv`` and ``shortcut.bn``;
    then ``fc``. Each group but the first halves height and width. The images are normalised first:
    ``(x - mean) / std``.

    Args:
        in_channels: channels of the images.
        classes: number of outputs.
        widths: channels of the groups; the first convolution has as many as the first group.
        blocks: basic blocks in each group.
        mean: what is subtracted from the images, one number for all channels or one for each.
        std: what the images are divided by after that, likewise.

    Raises:
        InputError: if ``widths`` are not one for each group, a size or ``std`` is not positive, or ``mean`` or ``std``
            do not fit the channels.

    Attributes:
        groups: how many there are.
    """

    groups = 3
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        in_channels: int,
        classes: int,
        widths: tuple[int, ...],
        blocks: int,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        _check_sizes(in_channels, classes, widths, blocks, self.groups)
        means, stds = _per_channel("mean", mean, in_channels), _per_channel("std", std, in_channels)
        if min(stds) <= 0:
            raise InputError(f"std={std!r} must be positive: the images are divided by it")
        self.register_buffer("mean", torch.tensor(means).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(stds).reshape(-1, 1, 1))
        self.conv1 = _conv3x3(in_channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        for number, (before, width) in enumerate(itertools.pairwise((widths[0], *widths)), start=1):
            self.add_module(f"group{number}", _group(before, width, blocks, stride=1 if number == 1 else 2))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return logits for ``images`` of ``[batch, in_channels, height, width]``, of any height and width."""
        x = (images - self.mean) / self.std
        x = F.relu(self.bn1(self.conv1(x)))
        for number in range(1, self.groups + 1):
            x = self.get_submodule(f"group{number}")(x)
        return self.fc(x.mean((2, 3)))


class ResNet18(ResNet):
    """ResNet-18 for small images: four groups of two basic blocks with 64 to 512 channels, 11.2 million parameters.

    In place of a 7x7 convolution and a pooling, which suit images of 224x224, there is one 3x3 convolution.

    Args: as for `ResNet`.
    """

    groups = 4

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 10,
        widths: tuple[int, int, int, int] = (64, 128, 256, 512),
        blocks: int = 2,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__(in_channels, classes, widths, blocks, mean, std)


class ResNet20(ResNet):
    """ResNet-20: three groups of three basic blocks with 16, 32 and 64 channels, 0.27 million parameters.

    He et al. have shortcuts without parameters; here they are 1x1 convolutions where the shape changes.

    Args: as for `ResNet`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 10,
        widths: tuple[int, int, int] = (16, 32, 64),
        blocks: int = 3,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__(in_channels, classes, widths, blocks, mean, std)


class ResNet28(ResNet):
    """ResNet-28 as in the paper's Section 4.3: three groups of four basic blocks with 64, 128 and 256 channels.

    Args: as for `ResNet`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 10,
        widths: tuple[int, int, int] = (64, 128, 256),
        blocks: int = 4,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__(in_channels, classes, widths, blocks, mean, std)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch-norm, whose result is added to the block's input, or to a projection of it.

    Args:
        in_width: channels that come in.
        width: channels that go out.
        stride: of the first convolution and of the projection.
    """

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_width, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        same_shape = stride == 1 and in_width == width
        self.shortcut = nn.Identity() if same_shape else _projection(in_width, width, stride)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch width rows columns"]:
        """Return the rectified sum of both ways through the block."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


def _group(in_width: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_width, width, stride)
    return nn.Sequential(first, *(BasicBlock(width, width, stride=1) for _ in range(blocks - 1)))


def _conv3x3(in_width: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_width, width, kernel_size=3, stride=stride, padding=1, bias=False)


def _projection(in_width: int, width: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_width, width, kernel_size=1, stride=stride, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(width)))


def _check_sizes(in_channels: int, classes: int, widths: tuple[int, ...], blocks: int, groups: int) -> None:
    if len(widths) != groups:
        raise InputError(f"widths={widths!r} must be {groups} numbers, one for each group")
    if min(in_channels, classes, blocks, *widths) < 1:
        raise InputError(
            f"in_channels={in_channels}, classes={classes}, widths={widths} and blocks={blocks} must all be at least 1"
        )


def _per_channel(name: str, values: float | Sequence[float], channels: int) -> list[float]:
    """One number for each channel, also where one for all is given."""
    numbers = [float(value) for value in values] if isinstance(values, Sequence) else [float(values)] * channels
    if len(numbers) != channels:
        raise InputError(f"{name}={values!r} must be one number, or one for each of the {channels} channels")
    return numbers
