"""Merges the ranges that each process of a distributed run has observed, so that all have one grid.

DistributedDataParallel broadcasts rank 0's buffers at every forward, which would throw away what
the other ranks observed. The buffers of fake-quantizes are kept out of that broadcast, and merged
in one collective where a common grid is needed: before a validation, a checkpoint, a freeze and the
conversion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn

from qat_lightning.fake_quantize import fake_quantizes
from qat_lightning.ranges import has_histogram, has_range, is_moving_average, set_range

_IGNORED = "_ddp_params_and_buffers_to_ignore"


def keep_out_of_ddp_broadcast(module: nn.Module) -> None:
    """Makes DistributedDataParallel leave the buffers of every fake-quantize in `module` alone.

    Must happen before `module` is wrapped. What the user has listed stays listed. Histograms cannot be
    merged by their extremes: they stay in the broadcast, so that all ranks have rank 0's.
    """
    names = {
        f"{name}.{buffer}"
        for name, child in fake_quantizes(module)
        if not has_histogram(child)
        for buffer, _ in child.named_buffers()
    }
    setattr(module, _IGNORED, sorted(names.union(getattr(module, _IGNORED, ()))))


def merge_ranges(module: nn.Module) -> None:
    """Gives all processes the ranges that all of them observed together.

    A minimum is the least of the ranks', a maximum the greatest; of moving averages it is the mean.
    A rank whose observer saw no data contributes nothing. One all-gather of one flat tensor; every
    rank then computes the same numbers in the same order, so that the grids are equal bit for bit.
    Without distributed training it does nothing.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    if distributed.get_world_size() == 1:
        return
    children = {
        name: child for name, child in fake_quantizes(module) if has_range(child) and not has_histogram(child)
    }
    ranges = [_range_of(module, name, child) for name, child in children.items()]
    if not ranges:
        return
    flat = torch.cat([torch.cat(pair) for pair in ranges])
    gathered = flat.new_empty(distributed.get_world_size(), flat.numel())
    distributed.all_gather(list(gathered.unbind()), flat)
    start = 0
    for child, (low, _) in zip(children.values(), ranges, strict=True):
        size = low.numel()
        lows, highs = gathered[:, start : start + 2 * size].split(size, dim=1)
        start += 2 * size
        low, high = _merged(lows, highs, mean=is_moving_average(child))
        if torch.isfinite(low).all():  # else no rank has seen anything
            set_range(child, low, high)


def _range_of(module: nn.Module, name: str, child: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The flat minimum and maximum of one observer, infinite where it saw nothing."""
    observer = child.activation_post_process
    low, high = observer.min_val.flatten(), observer.max_val.flatten()
    if low.numel():
        return low, high
    # A per-channel observer knows its size from its first tensor; the other ranks' may have seen
    # one.
    layer: Any = module.get_submodule(name.removesuffix(".weight_fake_quant"))
    channels = layer.weight.shape[0]
    return low.new_full((channels,), torch.inf), high.new_full((channels,), -torch.inf)


def _merged(lows: torch.Tensor, highs: torch.Tensor, *, mean: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if not mean:
        return lows.amin(0), highs.amax(0)
    seen = torch.isfinite(lows) & torch.isfinite(highs)
    count = seen.sum(0)
    low = torch.where(seen, lows, 0).sum(0) / count
    high = torch.where(seen, highs, 0).sum(0) / count
    nobody = count == 0
    return low.masked_fill(nobody, torch.inf), high.masked_fill(nobody, -torch.inf)
