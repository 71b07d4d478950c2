"""A batch-norm without a layer before it, as a convolution of each channel with a single weight.

Runtimes have no int8 kernel for a batch-norm, but for such a convolution. In training it costs no more than
the batch-norm: the weight is one, so nothing is convolved.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from qat_lightning.base.torch_internals import parameters_of
from qat_lightning.modes.layers.fused_conv_bn import FusedConvBn


class NormLayer2d(FusedConvBn, nn.Conv2d):
    """`nn.BatchNorm2d`."""

    plain = nn.Conv2d

    @classmethod
    def of_norm(cls, norm: Any, weight_fake_quant: nn.Module, *, relu: bool) -> Self:
        """Makes the prepared form of a batch-norm; they share the parameters."""
        channels = norm.running_mean.numel()
        layer = nn.Conv2d(channels, channels, 1, groups=channels, bias=False, device="meta")
        del parameters_of(layer)["weight"]
        ones = torch.ones(channels, 1, 1, 1, device=norm.running_mean.device)
        layer.register_buffer("weight", ones, persistent=False)
        layer.training = norm.training
        return cls.of(layer, weight_fake_quant, relu=relu, bn=norm)

    def _rounded(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Returns the weight as it is: training does not multiply by it."""
        return self.weight  # type: ignore[no-any-return]

    def compute(
        self, x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None, *size: Any
    ) -> torch.Tensor:
        """Returns the convolution; without a bias, in training, it is `x`, before the batch-norm follows."""
        return x if self.training and bias is None else super().compute(x, rows, bias, *size)
