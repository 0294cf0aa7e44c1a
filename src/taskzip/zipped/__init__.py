"""The product of zipping: networks that share blocks of weights, their checkpoints and their summary."""

from taskzip.zipped.blocks import (
    Blocks,
    BlockSpec,
    BlocksSpec,
    RowSpec,
    along,
    block_name,
    has_own_scale,
    install,
    installed,
    scale_name,
    spec_of,
    weights_of,
)
from taskzip.zipped.faithfulness import record_answers
from taskzip.zipped.flops import flops_per_sample, record_flops
from taskzip.zipped.folding import Fold, fold, foldable, listed
from taskzip.zipped.model import ZippedModel, from_pretrained, load
from taskzip.zipped.network import History, LayerRecord
from taskzip.zipped.products import LARGE, LARGE_LINEAR
from taskzip.zipped.sizes import bytes_together
from taskzip.zipped.summary import separate_parameters

__all__ = [
    "LARGE",
    "LARGE_LINEAR",
    "BlockSpec",
    "Blocks",
    "BlocksSpec",
    "Fold",
    "History",
    "LayerRecord",
    "RowSpec",
    "ZippedModel",
    "along",
    "block_name",
    "bytes_together",
    "flops_per_sample",
    "fold",
    "foldable",
    "from_pretrained",
    "has_own_scale",
    "install",
    "installed",
    "listed",
    "load",
    "record_answers",
    "record_flops",
    "scale_name",
    "separate_parameters",
    "spec_of",
    "weights_of",
]
