"""Joint networks as files that other runtimes read."""

from taskzip.export.executorch import export_executorch
from taskzip.export.onnx import export_onnx

__all__ = ["export_executorch", "export_onnx"]
