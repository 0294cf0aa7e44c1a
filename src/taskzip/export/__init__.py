"""Joint networks as files that other runtimes read."""

from taskzip.export.executorch import export_executorch
from taskzip.export.onnx import export_onnx
from taskzip.export.torch_graph import export_graph

__all__ = ["export_executorch", "export_graph", "export_onnx"]
