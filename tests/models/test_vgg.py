"""VGG-16: torchvision's names and sizes, and which inputs and arguments it takes."""

import pytest
import torch
from torch import nn

from taskzip.errors import InputError
from taskzip.models import VGG16

NARROW = (2, 2, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6)


@pytest.fixture(scope="module")
def full_size() -> VGG16:
    """The full network without memory behind its half a gigabyte of weights."""
    with torch.device("meta"):
        return VGG16()


def tiny(**arguments) -> VGG16:
    return VGG16(**{"classes": 7, "widths": NARROW, "hidden": 8, **arguments}).eval()


def test_it_has_as_many_parameters_as_torchvisions(full_size: VGG16):
    assert sum(p.numel() for p in full_size.parameters()) == 138_357_544


def test_its_parameters_are_named_as_torchvisions(full_size: VGG16):
    layers = [f"features.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)]
    layers += [f"classifier.{i}" for i in (0, 3, 6)]
    assert list(full_size.state_dict()) == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    shapes = {name: tuple(p.shape) for name, p in full_size.named_parameters()}
    assert shapes["features.0.weight"] == (64, 3, 3, 3)
    assert shapes["features.28.weight"] == (512, 512, 3, 3)
    assert shapes["classifier.0.weight"] == (4096, 25_088)
    assert shapes["classifier.6.bias"] == (1000,)


def test_with_batch_norm_it_is_named_as_torchvisions_vgg16_bn():
    model = tiny(batch_norm=True)
    numbers = [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]
    for number in numbers:
        assert isinstance(model.features[number], nn.Conv2d)
        assert isinstance(model.features[number + 1], nn.BatchNorm2d)
    assert len(model.features) == 44
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def test_five_poolings_leave_seven_by_seven_of_the_usual_image():
    assert tiny().features(torch.rand(1, 3, 224, 224)).shape == (1, 6, 7, 7)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 32)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_of_at_least_32_fits(channels: int, size: tuple[int, int]):
    assert tiny(in_channels=channels)(torch.rand(2, channels, *size)).shape == (2, 7)


def test_every_hidden_layer_is_rectified():
    for layers in (tiny().features, tiny().classifier[:-1]):
        kinds = [type(layer) for layer in layers]
        weighted = [i for i, kind in enumerate(kinds) if kind in (nn.Conv2d, nn.Linear)]
        assert all(kinds[i + 1] is nn.ReLU for i in weighted)


def test_dropout_is_as_given():
    assert [m.p for m in tiny(dropout=0.25).modules() if isinstance(m, nn.Dropout)] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (64, 128)}, "VGG16 has 13 convolutions, but widths has 2 numbers"),
        ({"widths": (0, *NARROW[1:])}, "must all be at least 1"),
        ({"classes": 0}, "classes=0, .* must all be at least 1"),
        ({"in_channels": 0}, "in_channels=0, .* must all be at least 1"),
        ({"hidden": 0}, "hidden=0 must all be at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str):
    with pytest.raises(InputError, match=message):
        tiny(**arguments)
