"""Convolution and batch-norm trained as one int8 layer, without the division of torch.ao's module.

The int8 network runs the convolution with batch-norm folded into its weight: channel `c` of the weight is
multiplied by `f[c] = gamma[c] / sqrt(var[c] + eps)`, and rounded. With symmetric per-channel qparams a
channel's scale is proportional to the channel, so that rounding and folding commute:
`round(f * w) = f * round(w)`. Training therefore rounds the plain weight and runs the plain convolution, and
batch-norm follows as in float training. torch.ao's module (Krishnamoorthi 2018, section 3.2.2) rounds the
folded weight and divides the convolution's output by `f` again. That costs several more passes over the
activations, and gives NaN where `f` is zero.

In eval mode the folded weight is rounded, and the pair runs as one convolution with a bias: the arithmetic of
the int8 network. Training with frozen statistics does the same where that is cheaper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.ao.nn.intrinsic import qat as nniqat

from qat_lightning.fake_quant.fake_quantize import EPS
from qat_lightning.fake_quant.numerics import rectify, round_weight
from qat_lightning.modes.layers.integer_arithmetic import IntegerArithmetic
from qat_lightning.modes.trace.fixed_norms import FixedNorm


class FusedConvBn(IntegerArithmetic):
    """The forward of a fused pair whose weight has symmetric per-channel qparams."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    bn: Any
    freeze_bn: bool
    training: bool
    weight_fake_quant: Any
    _conv_forward: Any

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._folds(x):
            magnitude = self.weight_fake_quant.magnitude(self.weight)
            y = self.bn(self._conv_forward(x, self._rounded(magnitude), self.bias))
            self._observe(magnitude)  # with the statistics that batch-norm has just updated
            return y
        if (self.training and self.weight_fake_quant.observing) or not self.weight_fake_quant.seen:
            self._observe(self.weight_fake_quant.magnitude(self.weight))
        return self._conv_forward(x, self._folded(self._factor()), self.folded_bias())

    def folded_bias(self) -> torch.Tensor:
        """Returns the bias of the folded convolution, which eval mode runs."""
        factor = self._factor()
        mean = self.bn.running_mean if self.bias is None else self.bn.running_mean - self.bias
        return -mean * factor if self.bn.bias is None else self.bn.bias - mean * factor

    def _folds(self, x: torch.Tensor) -> bool:
        """Whether to fold batch-norm into the weight, instead of running it as an operation of its own.

        Eval mode folds, as the int8 network does. In training with frozen statistics both ways compute the
        same function, and the cheaper one runs: folding passes over the weight, batch-norm over the
        activations.
        """
        frozen = self.freeze_bn or isinstance(self.bn, FixedNorm)
        return not self.training or (frozen and self.weight.numel() < x.numel())

    def _factor(self) -> torch.Tensor:
        """Returns the factor by which batch-norm multiplies each channel."""
        rsqrt = torch.rsqrt(self.bn.running_var + self.bn.eps)
        return rsqrt if self.bn.weight is None else self.bn.weight * rsqrt

    @torch.no_grad()
    def _observe(self, magnitude: torch.Tensor) -> None:
        """Sets the range of the folded weight, from the largest magnitudes of the plain one."""
        fake_quant = self.weight_fake_quant
        if (self.training and fake_quant.observing) or not fake_quant.seen:
            fake_quant.observe_magnitude(magnitude * self._factor().abs())

    def _folded(self, factor: torch.Tensor) -> torch.Tensor:
        """Returns the folded weight, fake-quantized."""
        fake_quant = self.weight_fake_quant
        if not fake_quant.rounding:
            return self.weight * factor.view(-1, *[1] * (self.weight.ndim - 1))
        return round_weight(self.weight, fake_quant.scale, fake_quant.bounds, factor)

    def _rounded(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Returns the plain weight, fake-quantized with the folded weight's scale divided by the factor.

        While the range follows the weight, this is the scale of the plain weight itself. A channel that
        batch-norm switches off has no usable folded scale, and takes the plain one, too.
        """
        fake_quant = self.weight_fake_quant
        if not fake_quant.rounding:
            return self.weight
        with torch.no_grad():
            scale = magnitude / fake_quant.quant_max
            if not fake_quant.observing:
                switched_off = fake_quant.scale <= EPS
                scale = torch.where(switched_off, scale, fake_quant.scale / self._factor().abs())
            scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        return round_weight(self.weight, scale, fake_quant.bounds, inside=fake_quant.observing)


class ConvBn1d(FusedConvBn, nniqat.ConvBn1d):
    """`nn.Conv1d` and `nn.BatchNorm1d`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(x)


class ConvBn2d(FusedConvBn, nniqat.ConvBn2d):
    """`nn.Conv2d` and `nn.BatchNorm2d`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(x)


class ConvBn3d(FusedConvBn, nniqat.ConvBn3d):
    """`nn.Conv3d` and `nn.BatchNorm3d`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(x)


class ConvBnReLU1d(FusedConvBn, nniqat.ConvBnReLU1d):
    """`nn.Conv1d`, `nn.BatchNorm1d` and `nn.ReLU`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rectify(self._forward(x), in_place=True)


class ConvBnReLU2d(FusedConvBn, nniqat.ConvBnReLU2d):
    """`nn.Conv2d`, `nn.BatchNorm2d` and `nn.ReLU`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rectify(self._forward(x), in_place=True)


class ConvBnReLU3d(FusedConvBn, nniqat.ConvBnReLU3d):
    """`nn.Conv3d`, `nn.BatchNorm3d` and `nn.ReLU`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rectify(self._forward(x), in_place=True)
