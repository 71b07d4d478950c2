"""Translates the quantize and dequantize operations of a reference graph to those of ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnxscript import opset18

from qat_lightning.modes.lowering.operations import OPERATIONS

op: Any = opset18


def _scalar(value: int, dtype: int) -> Any:
    return op.Constant(value=ir.tensor(value, dtype=ir.DataType(dtype)))


def _quantize_per_tensor(
    x: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int
) -> Any:
    return op.QuantizeLinear(x, scale, _scalar(zero_point, dtype))


def _dequantize_per_tensor(
    x: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int
) -> Any:
    return op.DequantizeLinear(x, scale, _scalar(zero_point, dtype))


def _quantize_per_channel(
    x: Any, scales: Any, zero_points: Any, axis: int, quant_min: int, quant_max: int, dtype: int
) -> Any:
    integers = op.QuantizeLinear(x, op.CastLike(scales, x), op.Cast(zero_points, to=dtype), axis=axis)
    return op.Clip(integers, _scalar(quant_min, dtype), _scalar(quant_max, dtype))


def _dequantize_per_channel(
    x: Any, scales: Any, zero_points: Any, axis: int, quant_min: int, quant_max: int, dtype: int
) -> Any:
    scales = op.Cast(scales, to=ir.DataType.FLOAT)
    return op.DequantizeLinear(x, scales, op.Cast(zero_points, to=dtype), axis=axis)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    OPERATIONS.quantize_per_tensor.default: _quantize_per_tensor,
    OPERATIONS.dequantize_per_tensor.default: _dequantize_per_tensor,
    OPERATIONS.quantize_per_channel.default: _quantize_per_channel,
    OPERATIONS.dequantize_per_channel.default: _dequantize_per_channel,
}
"""For `torch.onnx.export`: the function that translates each operation."""
