"""The product of zipping: networks that share blocks of weights, their checkpoints and their summary."""

from taskzip.zipped.checkpoint import load
from taskzip.zipped.hub import from_pretrained
from taskzip.zipped.model import LayerRecord, ZippedModel

__all__ = ["LayerRecord", "ZippedModel", "from_pretrained", "load"]
