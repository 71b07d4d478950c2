"""Merges the ranges that the processes of a distributed run have observed.

DistributedDataParallel broadcasts rank 0's buffers at every forward, and would overwrite the ranges that
other ranks observed. So the buffers of fake-quantizes are excluded from that broadcast. One collective merges
them whenever all ranks need the same qparams: before a validation, a checkpoint, a freeze and the conversion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from qat_lightning.base.torch_internals import ignore_in_ddp
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from qat_lightning.fake_quant.ranges import has_histogram, has_range, is_moving_average, set_range
from qat_lightning.modes.layers.trained_layer import weight_rows
from qat_lightning.run.distributed.processes import several_processes
from qat_lightning.run.distributed.qparams_check import check_same_qparams


def keep_out_of_ddp_broadcast(module: nn.Module) -> None:
    """Excludes the buffers of every fake-quantize in `module` from DistributedDataParallel's broadcast.

    Call it before `module` is wrapped. Names that the user has excluded stay excluded. Histogram observers
    cannot be merged by minimum and maximum, so they stay in the broadcast: all ranks use rank 0's.
    """
    names = {
        f"{name}.{buffer}"
        for name, child in fake_quantizes(module)
        if not has_histogram(child)
        for buffer, _ in child.named_buffers()
    }
    ignore_in_ddp(module, names)


def merge_ranges(module: nn.Module) -> None:
    """Merges the ranges of all processes, and sets the result on each.

    Minima and maxima become the least and the greatest of all ranks, moving averages become their mean, and a
    histogram is taken from the first rank that has one. Observers that saw no data do not count. There is one
    all-gather of one flat tensor. Every rank then computes the same numbers in the same order, so the qparams
    are equal bit for bit, and this is checked. Without distributed training it does nothing.

    Raises:
        RankMismatchError: The qparams of a fake-quantize differ between ranks. Every rank raises it.
    """
    if not several_processes():
        return
    children = {name: child for name, child in fake_quantizes(module) if has_range(child)}
    observed = [_observed_by(module, name, child) for name, child in children.items()]
    if observed:
        flat = torch.cat(observed)
        gathered = flat.new_empty(distributed.get_world_size(), flat.numel())
        distributed.all_gather(list(gathered.unbind()), flat)
        sizes = [each.numel() for each in observed]
        for child, rows in zip(children.values(), gathered.split(sizes, dim=1), strict=True):
            (_set_histogram if has_histogram(child) else _set_range)(child, rows)
    check_same_qparams(module)


def _observed_by(module: nn.Module, name: str, child: Any) -> Tensor:
    """Returns the minima and maxima of an observer, infinite if it saw nothing, and its histogram."""
    observer = child.activation_post_process
    low, high = observer.min_val.flatten(), observer.max_val.flatten()
    if has_histogram(child):
        return torch.cat([low, high, observer.histogram])
    if low.numel():
        return torch.cat([low, high])
    # A per-channel observer gets its size from its first tensor. Other ranks' observers may have one already.
    layer: Any = module.get_submodule(name.removesuffix(".weight_fake_quant"))
    channels = len(weight_rows(layer))
    return torch.cat([low.new_full((channels,), torch.inf), high.new_full((channels,), -torch.inf)])


def _set_range(child: Any, rows: Tensor) -> None:
    low, high = _merged(*rows.chunk(2, dim=1), mean=is_moving_average(child))
    if torch.isfinite(low).all():  # else no rank has seen data
        set_range(child, low, high)


def _set_histogram(child: Any, rows: Tensor) -> None:
    """Sets the histogram of the first rank that saw data. Histograms of different ranges share no bins."""
    found = next((row for row in rows if torch.isfinite(row[:2]).all()), None)
    if found is not None:
        child.activation_post_process.histogram.copy_(found[2:])
        set_range(child, found[:1], found[1:2])


def _merged(lows: Tensor, highs: Tensor, *, mean: bool) -> tuple[Tensor, Tensor]:
    if not mean:
        return lows.amin(0), highs.amax(0)
    seen = torch.isfinite(lows) & torch.isfinite(highs)
    return _mean(lows, seen, torch.inf), _mean(highs, seen, -torch.inf)


def _mean(values: Tensor, seen: Tensor, nothing: float) -> Tensor:
    """Averages in float64, where the mean of equal numbers is exact, so frozen ranges do not change."""
    mean = torch.where(seen, values, 0).double().sum(0) / seen.sum(0)
    return mean.to(values.dtype).masked_fill(~seen.any(0), nothing)
