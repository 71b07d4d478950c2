"""The ranges that the observers of a prepared network have seen: read, set and checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qat_lightning.base.errors import ConversionError
from qat_lightning.fake_quant.fake_quantize import FakeQuantize, fake_quantizes


def has_range(fake_quantize: Any) -> bool:
    """Whether its observer follows a minimum and a maximum; an observer with fixed qparams does not."""
    return hasattr(getattr(fake_quantize, "activation_post_process", None), "min_val")


def has_histogram(fake_quantize: Any) -> bool:
    """Whether its observer keeps a histogram, so that the extremes alone do not determine the qparams."""
    return hasattr(fake_quantize.activation_post_process, "histogram")


def is_moving_average(fake_quantize: Any) -> bool:
    """Whether its observer averages over batches instead of keeping the extremes."""
    return getattr(fake_quantize.activation_post_process, "averaging_constant", 1) != 1


def set_range(fake_quantize: Any, low: torch.Tensor, high: torch.Tensor) -> None:
    """Sets its observer's range, and the scale and the zero point of that range."""
    observer = fake_quantize.activation_post_process
    for buffer, value in ((observer.min_val, low), (observer.max_val, high)):
        if buffer.numel() != value.numel():
            buffer.resize_(value.shape)
        buffer.copy_(value.view(buffer.shape))
    if isinstance(fake_quantize, FakeQuantize):
        fake_quantize.seen = has_seen_data(fake_quantize)
        fake_quantize.refresh()
        return
    scale, zero_point = fake_quantize.calculate_qparams()
    fake_quantize.scale.resize_(scale.shape).copy_(scale)
    fake_quantize.zero_point.resize_(zero_point.shape).copy_(zero_point)


def has_seen_data(fake_quantize: Any) -> bool:
    """Whether its observer has seen a tensor."""
    low = fake_quantize.activation_post_process.min_val
    return bool(low.numel() and torch.isfinite(low).all())


def _ranges_of_activations(module: nn.Module) -> dict[str, bool]:
    """Returns, for each fake-quantize of an activation, whether it saw data."""
    return {
        name: has_seen_data(child)
        for name, child in fake_quantizes(module)
        if not name.endswith("weight_fake_quant") and has_range(child)
    }


def unseen_in(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the fake-quantizes that saw no data in a `module` that did.

    What they are given is no floating-point tensor, or empty. In a `module` that saw no data there are none.
    """
    seen = _ranges_of_activations(module)
    return tuple(name for name, has_seen in seen.items() if not has_seen) if any(seen.values()) else ()


def check_observed(module: nn.Module) -> None:
    """Raises if no fake-quantize of an activation in a prepared `module` saw data.

    Raises:
        ConversionError: There is no range to convert with.
    """
    seen = _ranges_of_activations(module)
    if seen and not any(seen.values()):
        raise ConversionError(
            "A prepared network can be converted once its observers have seen data, but no batch "
            "has passed through it in training mode. Train it for at least one step, or load a "
            "checkpoint of a QAT run."
        )
