"""A convolution or linear layer and the batch-norm after it, trained as one int8 layer.

The int8 network runs the layer with batch-norm folded into its weight: channel `c` of the weight is
multiplied by `f[c] = gamma[c] / sqrt(var[c] + eps)`, and rounded. With symmetric per-channel qparams a
channel's scale is proportional to the channel, so that rounding and folding commute:
`round(f * w) = f * round(w)`. Training therefore rounds the plain weight and runs the plain layer, and
batch-norm follows as in float training.

With any other qparams of the weight, training rounds the folded weight and divides the output by `f` again
(Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 3.2.2). That
costs several more passes over the activations.

In eval mode the folded weight is rounded, and the pair runs as one layer with a bias: the arithmetic of the
int8 network. Training with frozen statistics does the same where that is cheaper.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from qat_lightning.fake_quant.fake_quantize import EPS, FakeQuantize
from qat_lightning.fake_quant.numerics import rectify, round_weight
from qat_lightning.modes.layers.trained_layer import TrainedLayer, weight_rows
from qat_lightning.modes.trace.fixed_norms import FixedNorm


def commutes(weight_fake_quant: Any) -> bool:
    """Whether rounding a weight commutes with folding a batch-norm into it."""
    ours = isinstance(weight_fake_quant, FakeQuantize)
    return ours and weight_fake_quant.axis == 0 and weight_fake_quant.symmetric


class FusedConvBn(TrainedLayer):
    """The forward of a fused pair.

    Attributes:
        bn: The batch-norm. It may have no affine parameters, and may be fixed.
        freeze_bn: Whether its statistics are frozen.
    """

    weight: Any
    bias: Any
    bn: Any
    freeze_bn = False
    training: bool
    weight_fake_quant: Any

    @classmethod
    def of(
        cls, layer: nn.Module, weight_fake_quant: nn.Module, *, relu: bool, bn: nn.Module | None = None
    ) -> Self:
        """Makes the prepared form of a float layer and a batch-norm; they share the parameters."""
        made = super().of(layer, weight_fake_quant, relu=relu)
        made.bn = bn
        return made

    def to_float(self) -> Any:
        """Returns the float layer that int8 runs, with batch-norm folded in, and without the ReLU."""
        layer = super().to_float()
        with torch.no_grad():
            layer.weight = nn.Parameter(self.weight_of(self._times_factor(self._factor())))
            layer.bias = nn.Parameter(self.folded_bias())
        return layer

    @torch.no_grad()
    def to_int8(self) -> Any:
        """Returns the float layer with the weight and the bias that eval mode computes with, both rounded."""
        layer = super().to_int8()
        if self._commutes() and self.weight_fake_quant.seen:
            layer.weight = nn.Parameter(self.weight_of(self._folded(self._factor())))
        return layer

    def forward(self, x: torch.Tensor, *size: Any) -> torch.Tensor:
        """Returns the layer's output, before its own rounding."""
        y = self._commuting(x, *size) if self._commutes() else self._dividing(x, *size)
        return rectify(y, in_place=True) if self.relu else y

    def train(self, mode: bool = True) -> Self:
        """Switches the mode; frozen statistics stay frozen."""
        super().train(mode)  # type: ignore[misc]
        self.bn.train(mode and not self.freeze_bn)
        return self

    def freeze_bn_stats(self) -> None:
        """Stops the statistics of the batch-norm from moving."""
        self.freeze_bn = True
        self.bn.eval()

    def update_bn_stats(self) -> None:
        """Lets them move again."""
        self.freeze_bn = False
        self.bn.train(self.training)

    def folded_bias(self) -> torch.Tensor:
        """Returns the bias of the folded layer, which eval mode runs."""
        factor = self._factor()
        mean = self.bn.running_mean if self.bias is None else self.bn.running_mean - self.bias
        return -mean * factor if self.bn.bias is None else self.bn.bias - mean * factor

    def observe_weight(self) -> None:
        """Sets the range of the folded weight, unless it is frozen."""
        if self.row_is_channel:
            self._observe(self.weight_fake_quant.magnitude(weight_rows(self)))
        else:
            self.weight_fake_quant.observe(self._times_factor(self._factor()))

    def _commutes(self) -> bool:
        return self.row_is_channel and commutes(self.weight_fake_quant)

    def _commuting(self, x: torch.Tensor, *size: Any) -> torch.Tensor:
        if not self._folds(x):
            magnitude = self.weight_fake_quant.magnitude(weight_rows(self))
            y = self.bn(self.compute(x, self._rounded(magnitude), self.bias, *size))
            self._observe(magnitude)  # with the statistics that batch-norm has just updated
            return y  # type: ignore[no-any-return]
        if (self.training and self.weight_fake_quant.observing) or not self.weight_fake_quant.seen:
            self.observe_weight()
        return self.compute(x, self._folded(self._factor()), self.folded_bias(), *size)

    def _dividing(self, x: torch.Tensor, *size: Any) -> torch.Tensor:
        factor = self._factor()
        if not self.training:
            weight = self.weight_fake_quant(self._times_factor(factor))
            return self.compute(x, weight, self.folded_bias(), *size)
        # A residual branch may start with a factor of zero, by which nothing can be divided.
        factor = torch.where(factor.abs() < EPS, torch.ones_like(factor), factor)
        y = self.compute(x, self.weight_fake_quant(self._times_factor(factor)), None, *size)
        y = self._times(y, 1 / factor, dim=y.ndim - 1 if isinstance(self, nn.Linear) else 1)
        bias = None if self.bias is None else self._times(torch.ones_like(y[:1]), self.bias, dim=1)
        return self.bn(y if bias is None else y + bias)  # type: ignore[no-any-return]

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

    def _times_factor(self, factor: torch.Tensor) -> torch.Tensor:
        """Returns the rows of the weight times the factor of each output channel."""
        return weight_rows(self) * self.over_rows(factor)

    @staticmethod
    def _times(tensor: torch.Tensor, factor: torch.Tensor, dim: int) -> torch.Tensor:
        """Returns `tensor` times a factor for each index of a dimension."""
        shape = [1] * tensor.ndim
        shape[dim] = -1
        return tensor * factor.view(shape)

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
            return self._times_factor(factor)
        return round_weight(weight_rows(self), fake_quant.scale, fake_quant.bounds, factor)

    def _rounded(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Returns the plain weight, fake-quantized with the folded weight's scale divided by the factor.

        While the range follows the weight, this is the scale of the plain weight itself. A channel that
        batch-norm switches off has no usable folded scale, and takes the plain one, too.
        """
        fake_quant = self.weight_fake_quant
        if not fake_quant.rounding:
            return weight_rows(self)
        with torch.no_grad():
            scale = magnitude / fake_quant.quant_max
            if not fake_quant.observing:
                switched_off = fake_quant.scale <= EPS
                scale = torch.where(switched_off, scale, fake_quant.scale / self._factor().abs())
            scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        return round_weight(weight_rows(self), scale, fake_quant.bounds, inside=fake_quant.observing)


class ConvBn1d(FusedConvBn, nn.Conv1d):
    """`nn.Conv1d` and a batch-norm."""

    plain = nn.Conv1d


class ConvBn2d(FusedConvBn, nn.Conv2d):
    """`nn.Conv2d` and a batch-norm."""

    plain = nn.Conv2d


class ConvBn3d(FusedConvBn, nn.Conv3d):
    """`nn.Conv3d` and a batch-norm."""

    plain = nn.Conv3d


class LinearBn1d(FusedConvBn, nn.Linear):
    """`nn.Linear` and a batch-norm."""

    plain = nn.Linear
