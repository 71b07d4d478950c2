"""The scale and the zero point of a tensor of bytes, and the bytes of a float tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch

_SHIFT = 1.5 * 2**23
"""A float32 above this has steps of 1, so that adding it rounds; the lowest byte then holds the integer."""


class QParams(NamedTuple):
    """A scale and a zero point, and the bytes that a tensor with them may hold.

    Attributes:
        scale: The difference between two neighbouring values.
        zero_point: The byte that stands for 0.
        low: The smallest byte.
        high: The largest byte.
    """

    scale: float
    zero_point: int
    low: int = 0
    high: int = 255

    @property
    def full(self) -> bool:
        """Whether all 256 bytes are in use, as integer kernels assume."""
        return (self.low, self.high) == (0, 255)


def quantized(x: torch.Tensor, qparams: QParams, out: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the bytes of a float tensor, as `fake_quant.numerics` rounds."""
    return rounded(x.float().mul(1 / qparams.scale), qparams, out)


def rounded(steps: torch.Tensor, qparams: QParams, out: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the bytes of a float32 tensor without gaps that counts steps of the scale; overwrites it.

    `clamp(round(steps + zero_point))` and a conversion to bytes take three times as long: PyTorch converts
    floats to bytes one by one.
    """
    if qparams.zero_point:
        steps.add_(qparams.zero_point)
    steps.add_(_SHIFT).clamp_(_SHIFT + qparams.low, _SHIFT + qparams.high)
    integers = steps.view(torch.int32)
    return integers.to(torch.uint8) if out is None else out.copy_(integers)


def dequantized(integers: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """Returns the floats that bytes stand for."""
    return centered(integers, qparams).mul_(qparams.scale)


def centered(integers: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """Returns bytes minus their zero point, as floats."""
    steps = integers.to(torch.float32)
    return steps.sub_(qparams.zero_point) if qparams.zero_point else steps
