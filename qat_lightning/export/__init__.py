"""Files for the runtimes that people deploy with."""

from qat_lightning.export.onnx import export_onnx

__all__ = ["export_onnx"]
