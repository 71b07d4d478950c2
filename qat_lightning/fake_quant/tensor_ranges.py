"""Moves ranges with tensor operations, which neither a GPU nor a compiled forward has to wait for.

The code uses few operations, since on a GPU each takes longer to launch than to run.
"""

from __future__ import annotations

from typing import Any

import torch


def updated_ranges(
    fake_quantize: Any, low: torch.Tensor, high: torch.Tensor, finite: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the range after a tensor.

    Per-channel extremes become the range. Per-tensor extremes update it by the observer's rule.

    Args:
        fake_quantize: A fake-quantize, with the range before.
        low: Minimum of the tensor, or of each channel.
        high: Maximum, likewise.
        finite: Whether both are finite.
    """
    observer = fake_quantize.activation_post_process
    if fake_quantize.axis is not None:
        low = torch.where(finite, low, with_channels(observer.min_val, low, torch.inf))
        high = torch.where(finite, high, with_channels(observer.max_val, high, -torch.inf))
        return low, high
    old = torch.cat((observer.min_val.reshape(1), observer.max_val.reshape(1)))
    extremes = torch.cat((low, high))
    if fake_quantize.forward_extremes.calls > 1:
        old, extremes, finite = fake_quantize.forward_extremes.join(old, extremes, finite)
    low, high = torch.where(finite, _updated(fake_quantize, old, extremes), old).split(1)
    return low, high


def _updated(fake_quantize: Any, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Returns the range after the next batch: an average over batches, or the extremes of all of them."""
    if fake_quantize.averages:
        seen = old[0] <= old[1]  # at first they are inf and -inf
        share = fake_quantize.averaging.clamp(min=fake_quantize.activation_post_process.averaging_constant)
        return torch.where(seen, old + share * (new - old), new)
    return torch.cat((torch.minimum(old[:1], new[:1]), torch.maximum(old[1:], new[1:])))


def with_channels(buffer: torch.Tensor, like: torch.Tensor, unseen: float) -> torch.Tensor:
    """Returns a per-channel buffer; before the first tensor, which gives it channels, `unseen` for each."""
    return buffer if buffer.shape == like.shape else torch.full_like(like, unseen)


def assign(buffer: torch.Tensor, value: torch.Tensor) -> None:
    """Copies `value` into a buffer in place, so that every holder of the buffer sees it."""
    if buffer.numel() != value.numel():
        buffer.resize_(value.shape)
    buffer.copy_(value.reshape(buffer.shape))
