"""Exports prepared networks to files for deployment runtimes, and loads such files."""

from qat_lightning.export.load import load_runtime
from qat_lightning.export.onnx import export_onnx
from qat_lightning.export.openvino import export_openvino

__all__ = ["export_onnx", "export_openvino", "load_runtime"]
