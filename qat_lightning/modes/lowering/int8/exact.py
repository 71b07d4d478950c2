"""Layers in plain PyTorch: sums of integers in floats, which are exact up to a bound."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from qat_lightning.modes.lowering.int8.qparams import centered, quantized

CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ExactKernel:
    """Computes a layer with float32 sums, or with float64 sums where those of float32 may be inexact.

    Args:
        layer: An :class:`~qat_lightning.modes.lowering.int8.layers.Int8Layer`.
        rows: The weights of each output channel, if the weight itself does not have them as rows.
    """

    def __init__(self, layer: Any, rows: torch.Tensor | None = None) -> None:
        self.input, self.output = layer.qparams("input"), layer.output_qparams()
        self.geometry, self.relu = layer.geometry, layer.relu
        rows = layer.weight if rows is None else rows
        self.dtype = torch.float32 if _fits(rows, self.input.zero_point) else torch.float64
        self.weight = layer.weight.to(self.dtype)
        ndim = layer.weight.ndim - 1  # a result without its batch dimension
        scale = layer.weight_scale * torch.tensor(self.input.scale, dtype=torch.float32)
        self.scale, self.bias = _per_channel(scale, ndim), None
        if layer.bias is not None:
            self.bias = _per_channel(layer.bias, ndim)

    def __call__(self, x: torch.Tensor, *size: Any) -> torch.Tensor:
        sums = self._sums(centered(x, self.input).to(self.dtype), *size).float()
        y = sums.mul_(self.scale)
        y = y if self.bias is None else y.add_(self.bias)
        y = y.relu_() if self.relu else y
        return y if self.output is None else quantized(y, self.output)

    def _sums(self, x: torch.Tensor, *size: Any) -> torch.Tensor:
        if self.geometry is None:
            return F.linear(x, self.weight)
        convolve = CONVOLUTIONS[self.weight.ndim - 2]
        return convolve(x, self.weight, None, *self.geometry)


def _fits(weight: torch.Tensor, zero_point: int) -> bool:
    """Whether no sum of products leaves the integers that float32 holds, whatever the input."""
    largest = weight.flatten(1).to(torch.int64).abs().sum(1).amax() if weight.numel() else 0
    return int(largest) * max(zero_point, 255 - zero_point) <= 2**24


def _per_channel(values: torch.Tensor, ndim: int) -> torch.Tensor:
    return values.view(-1, *[1] * (ndim - 1))
