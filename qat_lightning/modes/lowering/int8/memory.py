"""Elementwise work on large tensors in blocks, so that float temporaries stay in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BLOCK = 1 << 17
"""Elements of a block: 512 KiB as floats."""


def in_blocks(compute: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """Applies an elementwise function to tensors of one shape.

    Args:
        compute: Takes as many tensors as `tensors`, and `out`, which is None or where to write the bytes.
        *tensors: Tensors of one shape.

    Returns:
        Bytes in the layout of the first tensor.
    """
    tensors = laid_out_alike(*tensors)
    if tensors[0].numel() <= BLOCK:
        return compute(*tensors, out=None)
    out = torch.empty_like(tensors[0], dtype=torch.uint8)
    for target, *parts in zip(*(flat(each).split(BLOCK) for each in (out, *tensors)), strict=True):
        compute(*parts, out=target)
    return out


def laid_out_alike(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns the tensors without gaps, with the elements of each in the same order in memory."""
    memory_format = format_of(tensors[0])
    return tuple(each.contiguous(memory_format=memory_format) for each in tensors)


def format_of(x: torch.Tensor) -> Any:
    """Returns the memory format of a tensor; contiguous for one that has gaps."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def flat(x: torch.Tensor) -> torch.Tensor:
    """Returns a view of a tensor without gaps, in the order of its memory."""
    return x.as_strided((x.numel(),), (1,))
