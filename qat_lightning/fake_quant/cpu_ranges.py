"""Moves ranges on a CPU with few tensor operations: on a small tensor each takes longer than its arithmetic.

The range of an activation is two numbers. numpy's float32 rounds each result as a tensor operation does, so
the range, the scale and the zero point equal those of :class:`FakeQuantize`'s own operations bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_TOO_WIDE = 2.0**128 - 2.0**103
"""From here on, float32 rounds to infinity."""


def is_eager_on_cpu(x: torch.Tensor) -> bool:
    """Whether reading a number from `x` costs no synchronisation and breaks no compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def move_range(fake_quantize: Any, low: float, high: float) -> None:
    """Updates a per-tensor range and its qparams with the extremes of a tensor."""
    observer = fake_quantize.activation_post_process
    finite = high - low < _TOO_WIDE
    if not finite:
        fake_quantize.nonfinite.fill_(True)
    old, new = (observer.min_val.item(), observer.max_val.item()), (low, high)
    if fake_quantize.forward_extremes.calls > 1:
        old, new = fake_quantize.forward_extremes.join_numbers(old, new, finite)
        finite = new[0] <= new[1]
    fake_quantize.seen = True
    if not finite:
        fake_quantize.refresh()
        return
    range_ = _updated_range(fake_quantize, old, new)
    observer.min_val.fill_(float(range_[0]))
    observer.max_val.fill_(float(range_[1]))
    _set_qparams(fake_quantize, *range_)


def set_ranges(fake_quantize: Any, low: torch.Tensor, high: torch.Tensor, magnitude: torch.Tensor) -> bool:
    """Sets the ranges and the scales of symmetric per-channel qparams.

    Args:
        fake_quantize: Gets them.
        low: Minimum of each channel.
        high: Maximum of each channel.
        magnitude: Largest magnitude of each channel.

    Returns:
        False, and nothing is set, if a bound is NaN or infinite, or if the buffers have other sizes.
    """
    observer, scale = fake_quantize.activation_post_process, fake_quantize.scale
    buffers = (observer.min_val, observer.max_val, scale, fake_quantize.zero_point)
    fits = low.numel() > 0 and all(buffer.shape == low.shape for buffer in buffers)
    if not fits or not magnitude.max().item() < torch.inf:
        return False
    observer.min_val.copy_(low)
    observer.max_val.copy_(high)
    torch.div(magnitude, _half_width(fake_quantize), out=scale).clamp_(min=fake_quantize.eps)
    fake_quantize.seen = True
    return True


def _updated_range(
    fake_quantize: Any, old: tuple[float, float], new: tuple[float, float]
) -> tuple[np.float32, np.float32]:
    """Returns the range after the next batch: an average over batches, or the extremes of all of them."""
    if not fake_quantize.averages:
        return np.float32(min(old[0], new[0])), np.float32(max(old[1], new[1]))
    low, high = np.float32(new[0]), np.float32(new[1])
    if old[0] > old[1]:  # nothing was seen
        return low, high
    constant = fake_quantize.activation_post_process.averaging_constant
    share = max(np.float32(fake_quantize.averaging.item()), np.float32(constant))
    before = np.float32(old[0]), np.float32(old[1])
    return before[0] + share * (low - before[0]), before[1] + share * (high - before[1])


def _set_qparams(fake_quantize: Any, low: np.float32, high: np.float32) -> None:
    """Computes what `symmetric_scale` and `affine_qparams` compute."""
    eps = np.float32(fake_quantize.eps)
    if fake_quantize.symmetric:
        scale = max(max(-low, high) / np.float32(_half_width(fake_quantize)), eps)
    else:
        low, high = min(low, np.float32(0)), max(high, np.float32(0))
        scale = max((high - low) / np.float32(fake_quantize.quant_max - fake_quantize.quant_min), eps)
        if fake_quantize.exact_value is not None and scale <= np.float32(fake_quantize.exact_value):
            scale = _with_exact_value(scale, np.float32(fake_quantize.exact_value))
        fake_quantize.zero_point.fill_(fake_quantize.quant_min - round(float(low / scale)))
    fake_quantize.scale.fill_(float(scale))


def _with_exact_value(scale: np.float32, value: np.float32) -> np.float32:
    """Returns a scale of which `value` is a multiple; like a tensor, it divides by multiplying an inverse."""
    one = np.float32(1)
    return value * (one / np.floor(value * (one / scale)))


def _half_width(fake_quantize: Any) -> int:
    width: int = fake_quantize.quant_max - fake_quantize.quant_min
    return width // 2
