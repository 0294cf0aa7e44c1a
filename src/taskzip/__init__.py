"""taskzip: merge trained networks, after training, into one network that does every task (Multi-Task Zipping)."""

from taskzip.errors import CheckpointError, ExportError, GraphError, InputError, TaskzipError, TaskzipWarning
from taskzip.export import export_executorch, export_graph, export_onnx
from taskzip.inspection import inspect
from taskzip.measuring import measure
from taskzip.plan import Budget, MaxDrop, Threshold
from taskzip.pruning import prune
from taskzip.retraining import Retraining, retrain
from taskzip.task import Task
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
