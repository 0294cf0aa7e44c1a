"""taskzip: merge trained networks, after training, into one network that does every task (Multi-Task Zipping)."""

from taskzip.errors import CheckpointError, ExportError, GraphError, InputError, TaskzipError, TaskzipWarning
from taskzip.export import export_executorch, export_graph, export_onnx
from taskzip.factoring import compress
from taskzip.planning import Budget, MaxDrop, Threshold, measure
from taskzip.pruning import prune
from taskzip.report import inspect
from taskzip.tasks import Task
from taskzip.training import Retraining, retrain
from taskzip.zipped import ZippedModel, from_pretrained, load
from taskzip.zipping import zip_tasks as zip

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "CheckpointError",
    "ExportError",
    "GraphError",
    "InputError",
    "MaxDrop",
    "Retraining",
    "Task",
    "TaskzipError",
    "TaskzipWarning",
    "Threshold",
    "ZippedModel",
    "__version__",
    "compress",
    "export_executorch",
    "export_graph",
    "export_onnx",
    "from_pretrained",
    "inspect",
    "load",
    "measure",
    "prune",
    "retrain",
    "zip",
]
