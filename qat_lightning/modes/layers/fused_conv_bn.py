"""Convolution and batch-norm trained as one int8 layer, without the division of torch.ao's module.

The int8 network runs the convolution with batch-norm folded into its weight: channel `c` of the weight is
multiplied by `f[c] = gamma[c] / sqrt(var[c] + eps)`, and rounded. A per-channel symmetric grid scales with
its channel, so that rounding and folding commute: `round(f * w) = f * round(w)`. In training the plain
weight is rounded, the plain convolution runs, and batch-norm follows as in float training. torch.ao's module
rounds the folded weight and divides the convolution's output by `f` again, which costs several more passes
over the activations, and gives NaN where `f` is zero (Krishnamoorthi 2018, section 3.2.2, describes it).

Once the statistics are frozen, and in eval mode, the folded weight is rounded and the pair is one
convolution with a bias: the arithmetic of the int8 network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.ao.nn.intrinsic import qat as nniqat

from qat_lightning.fake_quant.fake_quantize import EPS
from qat_lightning.fake_quant.numerics import rectify, round_weight
from qat_lightning.modes.layers.integer_arithmetic import IntegerArithmetic


class FusedConvBn(IntegerArithmetic):
    """The forward of a fused pair whose weight has a per-channel symmetric grid."""

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
            self._observe(magnitude)  # after batch-norm has moved its statistics: for what follows this step
            return y
        if (self.training and self.weight_fake_quant.observing) or not self.weight_fake_quant.seen:
            self._observe(self.weight_fake_quant.magnitude(self.weight))
        return self._conv_forward(x, self._folded(self._factor()), self.folded_bias())

    def folded_bias(self) -> torch.Tensor:
        """The bias of the convolution that the pair is in eval mode."""
        factor = self._factor()
        mean = self.bn.running_mean if self.bias is None else self.bn.running_mean - self.bias
        return -mean * factor if self.bn.bias is None else self.bn.bias - mean * factor

    def _folds(self, x: torch.Tensor) -> bool:
        """Whether batch-norm is folded into the weight, or follows as an operation of its own.

        In eval mode it is, as in the int8 network. In training with frozen statistics both are the same
        function, and the one with less to do is taken: folding passes over the weight, batch-norm over the
        activations.
        """
        return not self.training or (self.freeze_bn and self.weight.numel() < x.numel())

    def _factor(self) -> torch.Tensor:
        """What batch-norm multiplies each channel by."""
        rsqrt = torch.rsqrt(self.bn.running_var + self.bn.eps)
        return rsqrt if self.bn.weight is None else self.bn.weight * rsqrt

    @torch.no_grad()
    def _observe(self, magnitude: torch.Tensor) -> None:
        """Makes the grid of the folded weight, from the greatest magnitudes of the plain one."""
        grid = self.weight_fake_quant
        if (self.training and grid.observing) or not grid.seen:
            grid.observe_magnitude(magnitude * self._factor().abs())

    def _folded(self, factor: torch.Tensor) -> torch.Tensor:
        """The folded weight, rounded to its grid."""
        grid = self.weight_fake_quant
        if not grid.rounding:
            return self.weight * factor.view(-1, *[1] * (self.weight.ndim - 1))
        return round_weight(self.weight, grid.scale, grid.bounds, factor)

    def _rounded(self, magnitude: torch.Tensor) -> torch.Tensor:
        """The plain weight, rounded to the grid of the folded one divided by the factor.

        While the grid follows the weight, that is the grid of the plain weight. It also serves for a channel
        that batch-norm switches off, whose folded grid is nothing.
        """
        grid = self.weight_fake_quant
        if not grid.rounding:
            return self.weight
        with torch.no_grad():
            scale = magnitude / grid.quant_max
            if not grid.observing:
                off = grid.scale <= EPS
                scale = torch.where(off, scale, grid.scale / self._factor().abs())
            scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        return round_weight(self.weight, scale, grid.bounds, inside=grid.observing)


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
