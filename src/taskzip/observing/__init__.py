"""What layers read and answer: forwards that wait at each layer, sums over a task's data."""

from taskzip.observing.answers import Answers
from taskzip.observing.observation import MaxRows, Observer
from taskzip.observing.orders import Order, misread
from taskzip.observing.sensitivity import Sensitivity, sensitivities
from taskzip.observing.suspension import MEMORY, Forwards, interleaved

__all__ = [
    "MEMORY",
    "Answers",
    "Forwards",
    "MaxRows",
    "Observer",
    "Order",
    "Sensitivity",
    "interleaved",
    "misread",
    "sensitivities",
]
