"""Transposed convolutions, which round the rows of their weight.

The weight of a transposed convolution has its input channels first: `(in, out / groups, kernel)`. A layer
rounds rows with a scale each, and these are

- without groups, the output channels: files have the scales along axis 1;
- with groups, the groups. An output channel is then a group and an index on axis 1, but ONNX, OpenVINO and
  PyTorch have scales along one axis only. A file has the scale of a group once for each of its input
  channels, along axis 0. In a depthwise transposed convolution, which is what groups are used for, a group is
  an output channel. With scales along axis 1 instead, all of its channels would share one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qat_lightning.base.torch_internals import convolve
from qat_lightning.modes.layers.fused_conv_bn import FusedConvBn
from qat_lightning.modes.layers.trained_layer import TrainedLayer


class TransposedLayer(TrainedLayer):
    """A transposed convolution that rounds its weight."""

    weight: Any
    groups: int
    out_channels: int
    in_channels: int

    @property
    def row_is_channel(self) -> bool:
        """Whether a row of the weight makes one output channel."""
        return self.groups in (1, self.out_channels)

    def rows_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns a weight as rows: one for each output channel, or for each group."""
        if self.groups == 1:
            return weight.transpose(0, 1)
        return weight.reshape(self.groups, -1, *weight.shape[2:])

    def weight_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the weight with these rows."""
        return rows.transpose(0, 1) if self.groups == 1 else rows.reshape(self.weight.shape)

    def over_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Returns values of the output channels in a shape that broadcasts over the rows."""
        if self.row_is_channel:
            return super().over_rows(values)
        repeated = values.view(self.groups, 1, -1).expand(-1, self.in_channels // self.groups, -1)
        return repeated.reshape(self.groups, -1, *[1] * (self.weight.ndim - 2))

    def channel_scale(self) -> torch.Tensor:
        """Returns the scale of each output channel's weights, or of all."""
        scale: torch.Tensor = self.weight_fake_quant.scale
        if self.row_is_channel or scale.numel() == 1:
            return scale
        return scale.repeat_interleave(self.out_channels // self.groups)

    def stored_scales(self) -> tuple[int, int] | None:
        """Returns the axis along which a file has the scales of the weight, and how often it has each."""
        return (1, 1) if self.groups == 1 else (0, self.in_channels // self.groups)

    def run(self, x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None, *size: Any) -> torch.Tensor:
        """Returns the transposed convolution of `x`."""
        return convolve(self, x, self.weight_of(rows), bias, *size)


class ConvTranspose1d(TransposedLayer, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d`."""

    plain = nn.ConvTranspose1d


class ConvTranspose2d(TransposedLayer, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d`."""

    plain = nn.ConvTranspose2d


class ConvTranspose3d(TransposedLayer, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d`."""

    plain = nn.ConvTranspose3d


class ConvTransposeBn1d(TransposedLayer, FusedConvBn, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` and a batch-norm."""

    plain = nn.ConvTranspose1d


class ConvTransposeBn2d(TransposedLayer, FusedConvBn, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` and a batch-norm."""

    plain = nn.ConvTranspose2d


class ConvTransposeBn3d(TransposedLayer, FusedConvBn, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` and a batch-norm."""

    plain = nn.ConvTranspose3d
