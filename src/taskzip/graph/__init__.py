"""Understanding a network: which units it has, which may change places, and who reads them."""

from taskzip.graph.analysis import Forward, analyse
from taskzip.graph.printing import table
from taskzip.graph.structure import OUTPUT, Layer, NormReaders, Rest, Structure, multiply

__all__ = [
    "OUTPUT",
    "Forward",
    "Layer",
    "NormReaders",
    "Rest",
    "Structure",
    "analyse",
    "multiply",
    "table",
]
