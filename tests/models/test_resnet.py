"""The residual networks: sizes, names, normalisation, and which arguments they take."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taskzip.errors import InputError
from taskzip.models import ResNet18, ResNet20, ResNet28
from taskzip.models.resnet import BasicBlock


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def convolutions(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def tiny(**arguments) -> ResNet20:
    return ResNet20(**{"widths": (2, 3, 4), "blocks": 1, "classes": 5, **arguments}).eval()


def test_resnet20_has_the_layers_of_he():
    model = ResNet20()
    shapes = convolutions(model)
    in_the_main_way = [name for name in shapes if "shortcut" not in name]
    assert len(in_the_main_way) + 1 == 20  # and the linear layer
    assert shapes["conv1"] == (16, 3, 3, 3)
    assert shapes["group1.0.conv1"] == (16, 16, 3, 3)
    assert shapes["group2.0.conv1"] == (32, 16, 3, 3)
    assert shapes["group3.2.conv2"] == (64, 64, 3, 3)
    assert model.fc.weight.shape == (10, 64)
    # He et al. give 0.27 million, without projections.
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert parameters(model) == 269_722 + projections


def test_resnet18_has_the_layers_of_he_behind_a_small_first_one():
    with torch.device("meta"):
        model = ResNet18(classes=1000)
    shapes = convolutions(model)
    assert len([name for name in shapes if "shortcut" not in name]) + 1 == 18
    assert shapes["conv1"] == (64, 3, 3, 3)
    assert shapes["group4.0.conv1"] == (512, 256, 3, 3)
    # torchvision's resnet18 has 11,689,512, with a first convolution of 7x7.
    assert parameters(model) == 11_689_512 - 64 * 3 * (7 * 7 - 3 * 3)
    assert ResNet18(widths=(2, 3, 4, 5), blocks=1).eval()(torch.rand(2, 3, 8, 8)).shape == (2, 10)


def test_resnet28_has_the_layers_of_the_paper():
    with torch.device("meta"):
        model = ResNet28(classes=100)
    shapes = convolutions(model)
    assert len([name for name in shapes if "shortcut" not in name]) == 1 + 3 * 4 * 2
    assert {shape[0] for name, shape in shapes.items() if name.startswith("group1")} == {64}
    assert {shape[0] for name, shape in shapes.items() if name.startswith("group2")} == {128}
    assert {shape[0] for name, shape in shapes.items() if name.startswith("group3")} == {256}


def test_only_blocks_that_change_the_shape_have_a_projection():
    shapes = convolutions(ResNet20())
    assert {name: shape for name, shape in shapes.items() if "shortcut" in name} == {
        "group2.0.shortcut.conv": (32, 16, 1, 1),
        "group3.0.shortcut.conv": (64, 32, 1, 1),
    }


def test_each_group_but_the_first_halves_the_image():
    model, shapes = tiny(blocks=2), {}
    for name in ("group1", "group2", "group3"):
        model.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: shapes.update({name: y.shape}))
    model(torch.rand(2, 3, 32, 32))
    assert shapes == {"group1": (2, 2, 32, 32), "group2": (2, 3, 16, 16), "group3": (2, 4, 8, 8)}


def test_a_block_adds_its_input_and_rectifies_the_sum():
    block = BasicBlock(3, 3, stride=1).eval()
    nn.init.zeros_(block.bn2.weight)
    nn.init.constant_(block.bn2.bias, -0.5)
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(block(x), F.relu(x - 0.5))


@pytest.mark.parametrize("size", [(32, 32), (33, 31), (7, 5), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_size_fits(channels: int, size: tuple[int, int]):
    assert tiny(in_channels=channels)(torch.rand(2, channels, *size)).shape == (2, 5)


def test_images_are_normalised_first():
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    model, plain = tiny(mean=mean, std=std), tiny()
    plain.load_state_dict(model.state_dict() | {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)})
    images = torch.rand(2, 3, 8, 8)
    normalised = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(model(images), plain(normalised))


def test_one_mean_and_std_serve_all_channels():
    model = tiny(in_channels=2, mean=0.25, std=0.5)
    assert model.mean.flatten().tolist() == [0.25, 0.25]
    assert model.std.flatten().tolist() == [0.5, 0.5]


def test_the_normalisation_is_saved_but_not_trained():
    model, other = tiny(mean=0.25, std=0.5), tiny()
    other.load_state_dict(model.state_dict())
    assert other.mean.flatten().tolist() == [0.25] * 3
    assert not {"mean", "std"} & dict(model.named_parameters()).keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": (0.1, 0.2)}, r"mean=\(0.1, 0.2\) must be one number, or one for each of the 3 channels"),
        ({"std": (1.0,)}, r"std=\(1.0,\) must be one number, or one for each of the 3 channels"),
        ({"std": 0.0}, "std=0.0 must be positive"),
        ({"std": (1.0, -1.0, 1.0)}, "must be positive"),
        ({"widths": (16, 32)}, r"widths=\(16, 32\) must be 3 numbers"),
        ({"widths": (16, 0, 64)}, "must all be at least 1"),
        ({"blocks": 0}, "blocks=0 must all be at least 1"),
        ({"classes": 0}, "classes=0, .* must all be at least 1"),
        ({"in_channels": 0}, "in_channels=0, .* must all be at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str):
    with pytest.raises(InputError, match=message):
        ResNet20(**arguments)
