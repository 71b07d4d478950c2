"""Rounds the sum of a tensor and a number with qparams of its own, in training as in int8.

torch.ao's `FloatFunctional.add_scalar` rounds nothing, and its int8 form derives the qparams of the sum from
those of the tensor: it rounds the number to a step of the scale, or rounds anew with a coarser scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.ao.nn.quantized import FloatFunctional, QFunctional


class RoundingFloatFunctional(FloatFunctional):
    """A FloatFunctional that also rounds the result of `add_scalar`."""

    def add_scalar(self, x: torch.Tensor, y: float) -> torch.Tensor:
        """Returns the rounded sum."""
        rounded: torch.Tensor = self.activation_post_process(torch.add(x, y))
        return rounded


class FloatAddingQFunctional(QFunctional):
    """Its int8 form."""

    def add_scalar(self, x: torch.Tensor, y: float) -> torch.Tensor:
        """Returns the sum as an int8 tensor with this module's qparams."""
        return torch.quantize_per_tensor(x.dequantize() + y, self.scale, self.zero_point, torch.quint8)

    @classmethod
    def from_float(cls, mod: Any, use_precomputed_fake_quant: bool = False) -> FloatAddingQFunctional:
        """Makes the int8 form of a prepared module; torch.ao's convert calls this."""
        scale, zero_point = mod.activation_post_process.calculate_qparams()
        functional = cls()
        functional.scale, functional.zero_point = float(scale), int(zero_point)
        return functional


def round_sums_with_numbers(prepared: nn.Module) -> None:
    """Makes the FloatFunctionals of a prepared network round such sums, in place."""
    for module in prepared.modules():
        if type(module) is FloatFunctional and getattr(module, "qconfig", None) is not None:
            module.__class__ = RoundingFloatFunctional
