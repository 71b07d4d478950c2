"""Quantize and dequantize as operations that a traced graph keeps whole, and that `export/` translates.

They do the arithmetic of `torch.ops.quantized_decomposed`, which only `torch.ao` registers.
"""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("qat_lightning", "DEF")
_QPARAMS = "int quant_min, int quant_max, ScalarType dtype"
_LIBRARY.define(f"quantize_per_tensor(Tensor input, float scale, int zero_point, {_QPARAMS}) -> Tensor")
_LIBRARY.define(f"dequantize_per_tensor(Tensor input, float scale, int zero_point, {_QPARAMS}) -> Tensor")
_LIBRARY.define(
    f"quantize_per_channel(Tensor input, Tensor scales, Tensor zero_points, int axis, {_QPARAMS}) -> Tensor"
)
_LIBRARY.define(
    f"dequantize_per_channel(Tensor input, Tensor scales, Tensor zero_points, int axis, {_QPARAMS}) -> Tensor"
)
OPERATIONS = torch.ops.qat_lightning
"""The four operations, on a tensor, its qparams, the smallest and the largest integer, and the dtype."""


def _quantize_per_tensor(
    x: torch.Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> torch.Tensor:
    return _integers(x.float() * (1 / scale), zero_point, quant_min, quant_max, dtype)


def _dequantize_per_tensor(
    x: torch.Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> torch.Tensor:
    return (x.float() - zero_point) * scale


def _quantize_per_channel(
    x: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    scale, zero_point = _along(axis, x, scales), _along(axis, x, zero_points)
    return _integers(x.float() * (1 / scale), zero_point, quant_min, quant_max, dtype)


def _dequantize_per_channel(
    x: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return (x - _along(axis, x, zero_points)) * _along(axis, x, scales)


def _integers(
    steps: torch.Tensor, zero_point: torch.Tensor | int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> torch.Tensor:
    return torch.clamp(torch.round(steps) + zero_point, quant_min, quant_max).to(dtype)


def _along(axis: int, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Returns a view of `values` that broadcasts along one dimension of `x`."""
    return values.view([-1 if dim == axis % x.ndim else 1 for dim in range(x.ndim)])


for _name, _function in (
    ("quantize_per_tensor", _quantize_per_tensor),
    ("dequantize_per_tensor", _dequantize_per_tensor),
    ("quantize_per_channel", _quantize_per_channel),
    ("dequantize_per_channel", _dequantize_per_channel),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
