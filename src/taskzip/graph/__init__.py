"""Understanding a network: which units it has, which may change places, and who reads them."""

from taskzip.graph.analysis import analyse
from taskzip.graph.structure import OUTPUT, BatchNormNames, Layer, NormReaders, Scales, Space, Structure, multiply

__all__ = ["OUTPUT", "BatchNormNames", "Layer", "NormReaders", "Scales", "Space", "Structure", "analyse", "multiply"]
