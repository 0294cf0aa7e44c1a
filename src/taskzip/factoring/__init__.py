"""Layers of low rank."""

from taskzip.factoring.compressing import compress

__all__ = ["compress"]
