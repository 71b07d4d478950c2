"""Checks for optional packages before work begins, and names the extra that installs them."""

from __future__ import annotations

from importlib.util import find_spec

from qat_lightning.base.errors import MissingExtraError

_EXTRA = {
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
}


def require(*packages: str, purpose: str) -> None:
    """Raises a `MissingExtraError` for the first of `packages` that is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtraError(package, _EXTRA[package], purpose)
