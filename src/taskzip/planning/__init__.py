"""How much to share: plans, cost curves, the search for a size or a loss, judging on held-out data."""

from taskzip.planning.curves import Curve, PartSize, Place, Read
from taskzip.planning.measuring import measure
from taskzip.planning.plan import Budget, MaxDrop, Quota, SearchPlan, Share, SharePlan, Threshold, as_plan
from taskzip.planning.ranks import Ranked, choose_ranks
from taskzip.planning.searching import search

__all__ = [
    "Budget",
    "Curve",
    "MaxDrop",
    "PartSize",
    "Place",
    "Quota",
    "Ranked",
    "Read",
    "SearchPlan",
    "Share",
    "SharePlan",
    "Threshold",
    "as_plan",
    "choose_ranks",
    "measure",
    "search",
]
