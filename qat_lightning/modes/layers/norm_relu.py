"""A batch-norm without a layer before it, and the ReLU after it: int8 kernels compute them at once."""

from __future__ import annotations

import torch
from torch import nn

from qat_lightning.fake_quant.numerics import rectify


class NormReLU(nn.Sequential):
    """`nn.BatchNorm2d` or `nn.BatchNorm3d`, and `nn.ReLU`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns the rectified result of the batch-norm; training keeps a byte for each element."""
        return rectify(self[0](input), in_place=True)
