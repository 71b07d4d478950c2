"""Rounds the result of an operation with qparams that follow from the operation, such as a sigmoid's."""

from __future__ import annotations

from typing import Any

import torch

from qat_lightning.fake_quant.numerics import fake_quantize
from qat_lightning.fake_quant.observers import FixedQParams
from qat_lightning.fake_quant.switches import Switches


class FixedFakeQuantize(Switches):
    """Rounds a tensor with a fixed scale and zero point.

    Args:
        observer: A constructor of :class:`FixedQParams`.
    """

    is_per_channel = is_dynamic = False
    ch_axis = -1
    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, observer: Any) -> None:
        super().__init__()
        fixed: FixedQParams = observer()
        self.activation_post_process = fixed
        self.dtype, self.qscheme = fixed.dtype, fixed.qscheme
        self.quant_min, self.quant_max = fixed.quant_min, fixed.quant_max
        self.register_buffer("scale", fixed.scale)
        self.register_buffer("zero_point", fixed.zero_point)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        if not bool(self.fake_quant_enabled):
            return X
        return fake_quantize(X, self.scale, self.zero_point, self.quant_min, self.quant_max)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the scale and the zero point."""
        return self.scale, self.zero_point

    def extra_repr(self) -> str:
        """Returns the qparams."""
        return f"scale={self.scale}, zero_point={self.zero_point}, dtype={self.dtype}"


def fixed_fake_quantize(scale: float, zero_point: int) -> Any:
    """Returns a constructor of fake-quantizes with a fixed scale and zero point for 8 bits."""
    return FixedFakeQuantize.with_args(
        observer=FixedQParams.with_args(scale=scale, zero_point=zero_point, quant_min=0, quant_max=255)
    )
