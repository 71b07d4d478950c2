"""Padding with a tensor's own values, as an operation that keeps the qparams of its input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from qat_lightning.base.torch_internals import quantized_tensor


def pad_values(x: torch.Tensor, pads: Sequence[int], mode: str) -> torch.Tensor:
    """Does the same as `F.pad`, also for int8 tensors, for which PyTorch lacks most modes.

    Args:
        x: The tensor.
        pads: How many elements to add on each side, as `F.pad` takes them.
        mode: `"circular"`, `"replicate"` or `"reflect"`.
    """
    if not x.is_quantized:
        return _wrap(x, pads) if mode == "circular" else F.pad(x, pads, mode)
    integers = F.pad(x.int_repr(), pads, mode)
    return quantized_tensor(integers, x.q_scale(), x.q_zero_point())


def _wrap(x: torch.Tensor, pads: Sequence[int]) -> torch.Tensor:
    """Pads with the values of the other side, in operations that each exporter knows."""
    for i in range(len(pads) // 2):
        dim, (before, after) = x.ndim - 1 - i, pads[2 * i : 2 * i + 2]
        parts = [x.narrow(dim, x.shape[dim] - before, before), x, x.narrow(dim, 0, after)]
        x = torch.cat([part for part, size in zip(parts, (before, 1, after), strict=True) if size], dim)
    return x
