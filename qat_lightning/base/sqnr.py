"""Measures how close one computation is to another."""

from __future__ import annotations

import torch


def sqnr(signal: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB; infinite where the two are equal."""
    noise = (signal.double() - approximation.double()).square().mean()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(signal.double().square().mean() / noise))
