"""Sums and products of two tensors of bytes."""

from __future__ import annotations

from functools import partial

import torch

from qat_lightning.modes.lowering.int8.memory import in_blocks
from qat_lightning.modes.lowering.int8.qparams import QParams, dequantized, rounded
from qat_lightning.modes.lowering.int8.state import Lowered, Run


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
        block = _sum_of_blocks(first, second, output, self.relu)

        def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            if a.shape != b.shape:
                a, b = torch.broadcast_tensors(a, b)
            return in_blocks(block, a, b)

        return run


def _sum_of_blocks(first: QParams, second: QParams, output: QParams, relu: bool) -> Run:
    """Returns a function that adds two tensors of one shape."""

    def block(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        y = dequantized(a, first).add_(dequantized(b, second))
        y = y.relu_() if relu else y
        return rounded(y.mul_(1 / output.scale), output, out)

    return block


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
    y = dequantized(a, large).mul_(dequantized(b, small))
    return rounded(y.mul_(1 / output.scale), output, out)
