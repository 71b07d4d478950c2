"""What each backend computes in int8: one table for each kind of backend."""

from __future__ import annotations

from qat_lightning.modes.targets.native import NATIVE
from qat_lightning.modes.targets.onnxruntime import ONNX_RUNTIME
from qat_lightning.modes.targets.openvino import OPENVINO
from qat_lightning.modes.targets.rules import Target

_OTHERS = {"onnxruntime": ONNX_RUNTIME, "openvino": OPENVINO}


def target_of(backend: str) -> Target:
    """Returns what a backend computes in int8."""
    return _OTHERS.get(backend, NATIVE)
