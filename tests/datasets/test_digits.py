"""What the demonstration is made of: the digits and their turns, and the small network."""

import sys

import pytest
import torch

from taskzip.datasets import digits, quarter_turns
from taskzip.errors import InputError
from taskzip.models import SmallCNN

pytest.importorskip("sklearn")


def test_the_split_is_fixed_and_has_no_image_twice():
    (train, train_labels), (test, test_labels) = digits("train"), digits("test")
    assert (train.shape, test.shape) == ((1347, 1, 8, 8), (450, 1, 8, 8))
    assert (train.dtype, train_labels.dtype) == (torch.float32, torch.int64)
    assert 0 == train.min() < train.max() == 1
    assert len(torch.cat([train, test]).flatten(1).unique(dim=0)) == 1797
    assert train_labels[:8].tolist() == digits()[1][:8].tolist()
    assert sorted(test_labels.unique().tolist()) == list(range(10))


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match="'valid'"):
        digits("valid")  # type: ignore[arg-type]


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"pip install 'taskzip\[demo\]'"):
        digits()


def test_every_image_is_turned_four_times():
    images = torch.rand(3, 1, 8, 8)
    turned, turns = quarter_turns(images)
    assert turns.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for image, turn, back in zip(turned, turns.tolist(), images.repeat(4, 1, 1, 1), strict=True):
        assert torch.equal(image.rot90(-turn, (1, 2)), back)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 9)])
def test_the_network_is_small_and_fits_the_images(channels: int, size: int):
    model = SmallCNN(4, in_channels=channels, image_size=size)
    assert model(torch.rand(2, channels, size, size)).shape == (2, 4)
    assert sum(p.numel() for p in model.parameters()) < 20_000
