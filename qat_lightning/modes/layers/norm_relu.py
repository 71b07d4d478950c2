"""A batch-norm without a layer before it, and the ReLU after it: int8 kernels compute them at once."""

from __future__ import annotations

from torch import nn


class NormReLU(nn.Sequential):
    """`nn.BatchNorm2d` or `nn.BatchNorm3d`, and `nn.ReLU`."""
