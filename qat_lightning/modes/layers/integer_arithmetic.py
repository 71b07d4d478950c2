"""Layers that compute in eval mode what int8 kernels compute: sums of integers, and a rounded bias.

An int8 kernel adds products of integers, and scales the sum once. The order of the additions does not change
the result. A sum of rounded floats does depend on the order: if it is close to the middle between two output
values, it may be rounded to the other one, and every later layer inherits the difference. So these layers add
integers as well, in float32, which represents 8-bit integers, their products and sums up to 2**24 exactly.
ONNX Runtime and qnnpack also round the bias to an integer with the scale of these sums, and so do these
layers (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 2.4).

In training neither matters, and both would cost passes over the activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qat_lightning.fake_quant.fake_quantize import FakeQuantize

_INPUT_KEY = "input_fake_quantize"


class IntegerArithmetic:
    """A layer with a fake-quantized weight, which may know the fake-quantize that produced its input."""

    weight_fake_quant: Any
    training: bool

    def integer_forward(self, layer: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        """Returns `layer(x, weight, bias)`; eval mode computes it with the integers of all three.

        Args:
            layer: Computes the layer.
            x: Its input.
            weight: The rounded weight, as rows with a scale each.
            bias: The bias, or None.
        """
        source = input_fake_quantize(self)
        if self.training or source is None or not self._has_integers(source, x):
            return layer(x, weight, bias)
        weight_scale = self.weight_fake_quant.scale
        sum_scale = source.scale * self.channel_scale()
        integer_weight = _integers(weight, _per_channel(weight_scale, weight.ndim))
        sums = layer(_integers(x, source.scale), integer_weight, None)
        ndim = weight.ndim - 1  # a result without its batch dimension
        if bias is None:
            return sums * _per_channel(sum_scale, ndim)
        rounded_bias = round_bias(bias, sum_scale)
        if source.like_onednn:
            return sums * _per_channel(sum_scale, ndim) + _per_channel(rounded_bias, ndim)
        return torch.addcmul(_per_channel(rounded_bias, ndim), sums, _per_channel(sum_scale, ndim))

    def channel_scale(self) -> torch.Tensor:
        """Returns the scale of each output channel's weights, or of all."""
        return self.weight_fake_quant.scale  # type: ignore[no-any-return]

    def _has_integers(self, source: FakeQuantize, x: torch.Tensor) -> bool:
        """Whether input and weight are rounded, and the arithmetic is exact for their integers."""
        weight = self.weight_fake_quant
        exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
        return exact and source.rounding and isinstance(weight, FakeQuantize) and weight.rounding


def input_fake_quantize(layer: Any) -> FakeQuantize | None:
    """Returns the fake-quantize that produced the input of `layer`; None if it is unknown."""
    return vars(layer).get(_INPUT_KEY)


def set_input_fake_quantize(layer: nn.Module, fake_quantize: FakeQuantize) -> None:
    """Tells `layer` which fake-quantize produced its input.

    The fake-quantize does not become a submodule of `layer`: the network has it already, elsewhere.
    """
    vars(layer)[_INPUT_KEY] = fake_quantize


def _per_channel(values: torch.Tensor, ndim: int) -> torch.Tensor:
    """Returns a view of `values` with `ndim` dimensions, channels first."""
    return values.view(-1, *[1] * (ndim - 1))


def round_bias(bias: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rounds a bias to multiples of `scale`, the product of the input's and the weight's scale."""
    return _integers(bias, scale) * scale


def _integers(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns the integers of a rounded `x`; gradients pass (straight-through)."""
    y = x / scale
    if torch.is_grad_enabled() and y.requires_grad:
        return y + (y.round() - y).detach()  # exact, since the difference is
    return y.round_()
