"""Sums and products of two tensors of bytes."""

from __future__ import annotations

from functools import partial

import torch

from qat_lightning.modes.lowering.int8 import onednn
from qat_lightning.modes.lowering.int8.memory import format_of, in_blocks
from qat_lightning.modes.lowering.int8.qparams import QParams, centered, rounded
from qat_lightning.modes.lowering.int8.state import Lowered, Run

_LARGE = 1 << 16
"""Above this many elements oneDNN adds faster than PyTorch's operators do."""


class Sum(Lowered):
    """Adds two tensors, and rectifies the result or not.

    Args:
        first: Qparams of the first tensor.
        second: Qparams of the second tensor.
        output: Qparams of the result.
        relu: Whether a ReLU follows.
    """

    def __init__(self, first: QParams, second: QParams, output: QParams, relu: bool) -> None:
        super().__init__(first=first, second=second, output=output)
        self.relu = relu

    def prepared(self) -> Run:
        first, second, output = (self.qparams(name) for name in ("first", "second", "output"))
        kernel = onednn.add_kernel(first, second, output, self.relu) if onednn.has_operators() else None
        block = _sum_of_blocks(first, second, output, self.relu)

        def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            if a.shape != b.shape:
                a, b = torch.broadcast_tensors(a, b)
            if kernel is not None and a.numel() > _LARGE and _are_images(a, b):
                return kernel(a, b)
            return in_blocks(block, a, b)

        return run


def _sum_of_blocks(first: QParams, second: QParams, output: QParams, relu: bool) -> Run:
    """Returns a function that adds two tensors in few passes: `first * factor + second * factor + offset`."""
    factors = [each.scale / output.scale for each in (first, second)]
    shares = (each.zero_point * factor for each, factor in zip((first, second), factors, strict=True))
    offset = torch.tensor(output.zero_point - sum(shares), dtype=torch.float32)
    low = output.zero_point if relu else 0
    bounds = QParams(1.0, 0, low)

    def block(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        y = torch.add(offset, a.to(torch.float32), alpha=factors[0])
        return rounded(y.add_(b.to(torch.float32), alpha=factors[1]), bounds, out)

    return block


def _are_images(*tensors: torch.Tensor) -> bool:
    """Whether tensors are images with channels last."""
    return all(format_of(each) is torch.channels_last for each in tensors)


class Product(Lowered):
    """Multiplies two tensors, of which one may be smaller, such as a factor for each channel.

    Args:
        first: Qparams of the first tensor.
        second: Qparams of the second tensor.
        output: Qparams of the result.
    """

    def __init__(self, first: QParams, second: QParams, output: QParams) -> None:
        super().__init__(first=first, second=second, output=output)

    def prepared(self) -> Run:
        first, second, output = (self.qparams(name) for name in ("first", "second", "output"))

        def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            large, small = first, second
            if a.numel() < b.numel():
                a, b, large, small = b, a, second, first
            multiply = partial(_product, large, small, output)
            if a.shape == b.shape:
                return in_blocks(multiply, a, b)
            if torch.broadcast_shapes(a.shape, b.shape) != a.shape:
                a, b = torch.broadcast_tensors(a, b)
            if a.ndim != b.ndim or len(a) != len(b) or len(a) < 2:
                return multiply(a, b)
            out = torch.empty_like(a)
            for x, y, target in zip(a.split(1), b.split(1), out.split(1), strict=True):
                multiply(x, y, out=target)
            return out

        return run


def _product(
    large: QParams,
    small: QParams,
    output: QParams,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiplies each element of `a`, and its zero point, by a factor from `b`."""
    factor = centered(b, small).mul_(large.scale * small.scale / output.scale)
    return rounded(centered(a, large).mul_(factor), output, out)
