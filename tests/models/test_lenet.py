"""The LeNets: sizes, names, and which inputs they take."""

import pytest
import torch

from taskzip.errors import InputError
from taskzip.models import LeNet5, LeNet300


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_lenet300_has_the_layers_of_the_paper():
    model = LeNet300()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")}
    assert shapes == {"fc1.weight": (300, 784), "fc2.weight": (100, 300), "fc3.weight": (10, 100)}
    assert parameters(model) == 266_610


def test_lenet5_has_the_layers_of_caffe():
    model = LeNet5()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "conv1.weight": (20, 1, 5, 5),
        "conv2.weight": (50, 20, 5, 5),
        "fc1.weight": (500, 800),
        "fc2.weight": (10, 500),
    }
    assert parameters(model) == 431_080


def test_lenet300_reads_images_and_flat_inputs_alike():
    model, images = LeNet300(), torch.rand(3, 1, 28, 28)
    assert model(images).shape == (3, 10)
    torch.testing.assert_close(model(images), model(images.flatten(1)))


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (2, 17), (1, 16)])
def test_lenet5_fits_every_image_size(channels: int, size: int):
    model = LeNet5(in_channels=channels, classes=7, widths=(4, 5, 6), image_size=size)
    assert model(torch.rand(2, channels, size, size)).shape == (2, 7)


def test_lenet5_refuses_images_that_vanish():
    with pytest.raises(InputError, match="at least 16x16, not image_size=15"):
        LeNet5(image_size=15)


def test_lenet300_is_three_linear_layers_with_relu_between():
    model, images = LeNet300(), torch.rand(2, 1, 28, 28)
    x = (model.fc1.weight @ images.flatten(1).T + model.fc1.bias[:, None]).clamp(min=0)
    x = (model.fc2.weight @ x + model.fc2.bias[:, None]).clamp(min=0)
    x = model.fc3.weight @ x + model.fc3.bias[:, None]
    torch.testing.assert_close(model(images), x.T)


def test_lenet5_rectifies_every_hidden_layer():
    model, images = LeNet5(), torch.rand(2, 1, 28, 28)
    inputs = {}
    for name, layer in model.named_children():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    model(images)
    assert inputs["conv2"].shape == (2, 20, 12, 12)
    assert inputs["fc1"].shape == (2, 800)
    for name in ("conv2", "fc1", "fc2"):
        assert (inputs[name] >= 0).all()
        assert (inputs[name] == 0).any()
