"""One network with fewer connections (L-OBS)."""

from taskzip.pruning.pruning import prune

__all__ = ["prune"]
