"""The 1,797 handwritten digits that come with scikit-learn: real data without a download (extra `demo`)."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from taskzip.datasets.mnist import Split
from taskzip.errors import InputError

SmallImages = Float[Tensor, "n 1 8 8"]
Labels = Int64[Tensor, " n"]

TEST_IMAGES = 450
_SPLIT_SEED = 0


def digits(split: Split = "train") -> tuple[SmallImages, Labels]:
    """Return scikit-learn's digits (UCI Optical Recognition of Handwritten Digits; Alpaydin, Kaynak; CC BY 4.0).

    The split is drawn once and for all, over all writers: the same image is in the same part on every machine.

    Args:
        split: ``"train"`` (1,347 images) or ``"test"`` (450).

    Returns:
        Images, float32 ``[n, 1, 8, 8]`` in [0, 1], and labels, int64 ``[n]`` in 0..9.

    Raises:
        InputError: if ``split`` is unknown or scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise InputError(f"split={split!r} is not one of 'train', 'test'")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("the digits come with scikit-learn, which is absent: pip install 'taskzip[demo]'") from error
    bundle = load_digits()
    order = torch.randperm(len(bundle.target), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    rows = order[:TEST_IMAGES] if split == "test" else order[TEST_IMAGES:]
    images = torch.from_numpy(bundle.images).float().div_(16).unsqueeze(1)
    return images[rows], torch.from_numpy(bundle.target).long()[rows]


def quarter_turns(images: Float[Tensor, "n c s s"]) -> tuple[Float[Tensor, "m c s s"], Int64[Tensor, " m"]]:
    """Return every image turned by 0, 90, 180 and 270 degrees, and by how many quarter turns: m = 4 n samples."""
    turned = torch.cat([images.rot90(k, (2, 3)) for k in range(4)])
    return turned, torch.arange(4, device=images.device).repeat_interleave(len(images))
