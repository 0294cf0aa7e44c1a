"""The paper's Fig. 2 and Table 1 (Sec. 4.1), and what each step is worth; run by `taskzip reproduce`."""

from taskzip.experiments import fig2, methods, table1
from taskzip.experiments.networks import Shelf

__all__ = ["Shelf", "fig2", "methods", "table1"]
