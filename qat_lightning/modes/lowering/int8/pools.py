"""Pooling of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from qat_lightning.fake_quant.numerics import settle_averages_
from qat_lightning.modes.lowering.int8.qparams import QParams, centered, rounded
from qat_lightning.modes.lowering.int8.state import Lowered, Run


class MaxPool(nn.Module):
    """Takes the largest byte of each window; PyTorch's own pooling does not know bytes.

    Args:
        kernel_size: The size of a window in each dimension.
        stride: The step from one window to the next.
        padding: How much to add on each side; the added elements are never the largest.
        dilation: The step from one element of a window to the next.
    """

    def __init__(
        self,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> None:
        super().__init__()
        self.windows = tuple(zip(kernel_size, stride, dilation, strict=True))
        self.pads = [pad for size in reversed(padding) for pad in (size, size)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == len(self.windows) + 2 and len(x) > 1:  # each image alone stays in the cache
            return torch.cat([self._pool(image) for image in x.split(1)])
        return self._pool(x)

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, self.pads) if any(self.pads) else x
        for dim, (size, stride, dilation) in enumerate(self.windows, x.ndim - len(self.windows)):
            length = (x.shape[dim] - dilation * (size - 1) - 1) // stride * stride + 1
            parts = [_every(x.narrow(dim, i * dilation, length), dim, stride) for i in range(size)]
            x = parts[0]
            for part in parts[1:]:
                x = torch.maximum(x, part)
        return x


def _every(x: torch.Tensor, dim: int, step: int) -> torch.Tensor:
    """Returns a view of every `step`-th element of a dimension."""
    if step == 1:
        return x
    return x[(*[slice(None)] * dim, slice(None, None, step))]


class Average(Lowered):
    """An average of bytes, computed with their integers.

    Args:
        pool: What it averages over.
        input: Qparams of the input.
        output: Qparams of the result.
    """

    def __init__(self, pool: Mean | nn.Module, input: QParams, output: QParams) -> None:
        super().__init__(input=input, output=output)
        self.pool = pool

    def prepared(self) -> Run:
        input, output, pool = self.qparams("input"), self.qparams("output"), self.pool
        factor = input.scale / output.scale

        def run(x: torch.Tensor) -> torch.Tensor:
            if isinstance(pool, Mean):
                sums, count = pool.sums(x)
                steps = sums.sub_(count * input.zero_point).mul_(factor / count).float()
            else:
                steps = pool(centered(x, input)).mul_(factor)
            return rounded(settle_averages_(steps) if input == output else steps, output)

        return run


class Mean(nn.Module):
    """The mean over some dimensions.

    Args:
        dims: The dimensions.
        keepdim: Whether they stay, with size 1.
    """

    def __init__(self, dims: Sequence[int], keepdim: bool) -> None:
        super().__init__()
        self.dims, self.keepdim = [*dims], keepdim

    def sums(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Returns sums of bytes, and how many each adds up. Up to 2**24 they are exact in float32."""
        count = math.prod(x.shape[dim] for dim in self.dims)
        exact = torch.float32 if count * 255 <= 2**24 else torch.float64
        return x.sum(self.dims, self.keepdim, dtype=exact), count
