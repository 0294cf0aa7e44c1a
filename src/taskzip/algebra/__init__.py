"""Pure functions of tensors: curvature, difference, matching, merging, least squares. No model, no data, no files."""

from taskzip.algebra.adaptation import following, schur_complement
from taskzip.algebra.curvature import LayerStatistics, Moments, damped
from taskzip.algebra.difference import functional_difference
from taskzip.algebra.factored import Factored, restricted
from taskzip.algebra.guard import (
    check_assembled,
    check_merging,
    check_pairing,
    check_reading,
    checked_batch_norm,
    checked_fit,
    some,
    spread_is_better,
)
from taskzip.algebra.low_rank import LowRank, low_rank, spectrum
from taskzip.algebra.matching import Matching, Pairs, choose, match, match_costs
from taskzip.algebra.merging import merge_weights
from taskzip.algebra.projection import project, rise
from taskzip.algebra.recalibration import SAME, batch_norm_statistics, least_squares, match_spread, own_scale
from taskzip.algebra.ridge import choose_ridge
from taskzip.algebra.sparsity import Connections, denser, pruned_layers, support, united
from taskzip.algebra.surgeon import removal_costs

__all__ = [
    "SAME",
    "Connections",
    "Factored",
    "LayerStatistics",
    "LowRank",
    "Matching",
    "Moments",
    "Pairs",
    "batch_norm_statistics",
    "check_assembled",
    "check_merging",
    "check_pairing",
    "check_reading",
    "checked_batch_norm",
    "checked_fit",
    "choose",
    "choose_ridge",
    "damped",
    "denser",
    "following",
    "functional_difference",
    "least_squares",
    "low_rank",
    "match",
    "match_costs",
    "match_spread",
    "merge_weights",
    "own_scale",
    "project",
    "pruned_layers",
    "removal_costs",
    "restricted",
    "rise",
    "schur_complement",
    "some",
    "spectrum",
    "spread_is_better",
    "support",
    "united",
]
