"""Weights that are stored as int8 and read as floats, for operations without an integer form."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qat_lightning.base.torch_internals import convolve


class StoredWeight(nn.Module):
    """A weight as integers.

    Args:
        integers: The weight.
        scale: Its scale, which broadcasts.
        zero_point: Its zero point, which broadcasts.
    """

    def __init__(self, integers: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        super().__init__()
        for name, value in (("integers", integers), ("scale", scale), ("zero_point", zero_point)):
            self.register_buffer(name, value)

    def forward(self) -> torch.Tensor:
        parts: Any = (self.integers, self.scale, self.zero_point)
        integers, scale, zero_point = parts
        return integers.float().sub_(zero_point).mul_(scale)


class FloatLayer(nn.Module):
    """A convolution or a linear layer that computes with floats.

    Args:
        layer: The layer of torch.nn, without its weight.
        weight: The weight.
        relu: Whether a ReLU follows.
    """

    def __init__(self, layer: Any, weight: StoredWeight, relu: bool) -> None:
        super().__init__()
        self.layer, self.weight, self.relu = layer, weight, relu

    def forward(self, x: torch.Tensor, *size: Any) -> torch.Tensor:
        return computed(self.layer, x, self.weight(), self.relu, *size)


def computed(layer: Any, x: torch.Tensor, weight: torch.Tensor, relu: bool, *size: Any) -> torch.Tensor:
    """Computes a layer of torch.nn with another weight, and a ReLU after it or none.

    Args:
        layer: The layer.
        x: Its input.
        weight: The weight.
        relu: Whether a ReLU follows.
        *size: The size that a transposed convolution is called with, if any.
    """
    if isinstance(layer, nn.Linear):
        y = F.linear(x, weight, layer.bias)
    else:
        y = convolve(layer, x, weight, layer.bias, *size)
    return F.relu(y) if relu else y


class Rounding(nn.Module):
    """A rounding with a scale for each channel; its result stays float.

    Args:
        scale: One for each channel.
        zero_point: One for each channel.
        axis: The dimension of the channels.
        bounds: The smallest and the largest integer.
    """

    def __init__(
        self, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, bounds: tuple[int, int]
    ) -> None:
        super().__init__()
        self.axis, self.bounds = axis, bounds
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = [1] * x.ndim
        shape[self.axis] = -1
        qparams: Any = (self.scale, self.zero_point)
        scale, zero_point = (each.view(shape) for each in qparams)
        integers = (x * (1 / scale)).round_().add_(zero_point).clamp_(*self.bounds)
        return integers.sub_(zero_point).mul_(scale)
