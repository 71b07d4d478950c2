"""Measures how close an approximation is to a signal, as a signal-to-quantization-noise ratio."""

from __future__ import annotations

import torch


def sqnr(signal: torch.Tensor, approximation: torch.Tensor) -> float:
    """Returns the signal-to-quantization-noise ratio in dB; infinite if the two are equal."""
    noise = (signal.double() - approximation.double()).square().mean()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(signal.double().square().mean() / noise))
