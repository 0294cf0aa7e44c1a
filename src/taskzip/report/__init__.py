"""What there is and what happened, for people: tables and pictures."""

from taskzip.report.curves import plot_curves
from taskzip.report.inspection import inspect
from taskzip.report.plots import plot_zip

__all__ = ["inspect", "plot_curves", "plot_zip"]
