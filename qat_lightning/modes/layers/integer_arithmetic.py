"""Layers that compute in eval mode what int8 kernels compute: with integers, and with a bias of their grid.

A kernel multiplies and adds integers, which has one result in whatever order, and scales it once. The same
sum of rounded floats differs with the order, and where it lies next to the middle between two points of the
output's grid it tips over to the other one; each layer passes that on. Integers of 8 bits are exact in
float32, and so are their products, and sums up to 2**24. A bias is an integer of the grid of these sums,
which ONNX Runtime and qnnpack round it to (Jacob et al. 2018, "Quantization and Training of Neural Networks
for Efficient Integer-Arithmetic-Only Inference", section 2.4).

In training neither matters, and both would cost passes over the activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.ao.nn import qat as nnqat
from torch.ao.nn.intrinsic import qat as nniqat
from torch.nn import functional as F

from qat_lightning.fake_quant.fake_quantize import FakeQuantize

_INPUT_KEY = "input_fake_quantize"


class IntegerArithmetic:
    """A layer whose weight is rounded, and that may know the grid of what it reads."""

    weight_fake_quant: Any
    training: bool

    def integer_forward(self, layer: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        """What `layer(x, weight, bias)` returns, in eval mode computed with the integers behind all three."""
        grid = input_fake_quantize(self)
        if self.training or grid is None or not self._rounds(grid, x):
            return layer(x, weight, bias)
        scale = self.weight_fake_quant.scale
        step = grid.scale * scale
        sums = layer(_integers(x, grid.scale), _integers(weight, _channels(scale, weight.ndim)), None)
        channels = weight.ndim - 1  # of a result that has no batch, as a bias has none
        if bias is None:
            return sums * _channels(step, channels)
        return torch.addcmul(_channels(round_bias(bias, step), channels), sums, _channels(step, channels))

    def _rounds(self, grid: FakeQuantize, x: torch.Tensor) -> bool:
        """Whether integers stand behind input and weight, and fit into the floats that are computed with."""
        weight = self.weight_fake_quant
        exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
        return exact and grid.rounding and isinstance(weight, FakeQuantize) and weight.rounding

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        return self.integer_forward(super()._conv_forward, x, weight, bias)  # type: ignore[misc]


def input_fake_quantize(layer: Any) -> FakeQuantize | None:
    """The fake-quantize that made what `layer` reads, where it is known."""
    return vars(layer).get(_INPUT_KEY)


def set_input_fake_quantize(layer: nn.Module, grid: FakeQuantize) -> None:
    """Tells `layer` what it reads; not as a submodule, which has its place already."""
    vars(layer)[_INPUT_KEY] = grid


def _channels(values: torch.Tensor, ndim: int) -> torch.Tensor:
    """A view with as many dimensions, the channels being the first."""
    return values.view(-1, *[1] * (ndim - 1))


def round_bias(bias: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Rounds a bias to multiples of the product of the input's and the weight's scale."""
    return _integers(bias, step) * step


def _integers(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The integers behind `x`; gradients pass (straight-through)."""
    y = x / scale
    if torch.is_grad_enabled() and y.requires_grad:
        return y + (y.round() - y).detach()  # exact: the difference is
    return y.round_()


class Conv1d(IntegerArithmetic, nnqat.Conv1d):
    """`nn.Conv1d`."""


class Conv2d(IntegerArithmetic, nnqat.Conv2d):
    """`nn.Conv2d`."""


class Conv3d(IntegerArithmetic, nnqat.Conv3d):
    """`nn.Conv3d`."""


class ConvReLU1d(IntegerArithmetic, nniqat.ConvReLU1d):
    """`nn.Conv1d` and `nn.ReLU`."""


class ConvReLU2d(IntegerArithmetic, nniqat.ConvReLU2d):
    """`nn.Conv2d` and `nn.ReLU`."""


class ConvReLU3d(IntegerArithmetic, nniqat.ConvReLU3d):
    """`nn.Conv3d` and `nn.ReLU`."""


class Linear(IntegerArithmetic, nnqat.Linear):
    """`nn.Linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.integer_forward(F.linear, x, self.weight_fake_quant(self.weight), self.bias)


class LinearReLU(IntegerArithmetic, nniqat.LinearReLU):
    """`nn.Linear` and `nn.ReLU`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.integer_forward(F.linear, x, self.weight_fake_quant(self.weight), self.bias))
