"""Algorithm 1: layer by layer, pair units, share their weights, correct the rest."""

from taskzip.zipping.algorithm import zip_tasks
from taskzip.zipping.correspondence import JointLayers, Layers, correspond
from taskzip.zipping.members import Member
from taskzip.zipping.settings import Settings, settings_alone
from taskzip.zipping.steps import compensated, observe, settle, survey

__all__ = [
    "JointLayers",
    "Layers",
    "Member",
    "Settings",
    "compensated",
    "correspond",
    "observe",
    "settings_alone",
    "settle",
    "survey",
    "zip_tasks",
]
