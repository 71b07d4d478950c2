"""Rewrites int8 transposed convolutions of images for runtimes without an int8 kernel for them.

A plain convolution makes the pixels as channels, and a DepthToSpace puts them side by side. ONNX Runtime
computes both with bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript.rewriter import pattern, rewrite

from qat_lightning.modes.lowering.sub_pixels import SubPixels, Transposed, sub_pixels


class _AsBlocks(pattern.RewriteRuleClassBase):
    """Rewrites a transposed convolution whose result is rounded."""

    def pattern(self, op: Any, x: Any, weight: Any, scale: Any, zero_point: Any) -> Any:
        y = op.ConvTranspose(x, weight, _allow_other_inputs=True, _outputs=["y"])
        return op.QuantizeLinear(y, scale, zero_point)

    def check(self, context: Any, x: Any, weight: Any, scale: Any, zero_point: Any, y: Any) -> Any:
        result = pattern.MatchResult()
        return result if _blocks_of(weight, y) else result.fail("there is no plain convolution of blocks")

    def rewrite(self, op: Any, x: Any, weight: Any, scale: Any, zero_point: Any, y: Any) -> Any:
        blocks = _blocks_of(weight, y)
        assert blocks is not None
        pixels = self.activated(op, _convolution(op, x, weight, y, blocks))

        def rounded(value: Any) -> Any:
            return op.DequantizeLinear(op.QuantizeLinear(value, scale, zero_point), scale, zero_point)

        if blocks.block > 1:
            pixels = op.DepthToSpace(rounded(pixels), blocksize=blocks.block, mode="CRD")
        if any((*blocks.lead, *blocks.tail)):
            pixels = _cut(op, rounded(pixels), blocks)
        return op.QuantizeLinear(pixels, scale, zero_point)

    def activated(self, op: Any, pixels: Any) -> Any:
        """Returns what follows the convolution, before the rounding."""
        return pixels


class _AsBlocksWithRelu(_AsBlocks):
    """Does the same with a ReLU between the two."""

    def pattern(self, op: Any, x: Any, weight: Any, scale: Any, zero_point: Any) -> Any:
        y = op.ConvTranspose(x, weight, _allow_other_inputs=True, _outputs=["y"])
        return op.QuantizeLinear(op.Relu(y), scale, zero_point)

    def activated(self, op: Any, pixels: Any) -> Any:
        """Returns what follows the convolution, before the rounding."""
        return op.Relu(pixels)


def _blocks_of(weight: Any, y: Any) -> SubPixels | None:
    """Returns the plain convolution for the transposed one that makes `y`, if its weight is int8."""
    integers, scales, _ = _stored(weight)
    if integers is None or scales is None or integers.ndim != 4:
        return None
    given = y.producer().attributes
    pads = [*given.get_ints("pads", [0] * 4)]
    if pads[:2] != pads[2:]:
        return None
    added, dilation = given.get_ints("output_padding", [0, 0]), given.get_ints("dilations", [1, 1])
    how = Transposed(given.get_ints("strides", [1, 1]), pads[:2], added, given.get_int("group", 1), dilation)
    return sub_pixels(torch.from_numpy(integers.copy()), how)


def _stored(weight: Any) -> Sequence[Any]:
    """Returns the integers, the scales and the zero points of a stored weight, each None if it is unknown."""
    node = weight.producer()
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) != 3:
        return None, None, None
    found = [ir.convenience.get_const_tensor(value) for value in node.inputs]
    return [None if each is None else each.numpy() for each in found]


def _convolution(op: Any, x: Any, weight: Any, y: Any, blocks: SubPixels) -> Any:
    """Adds the plain convolution."""
    transposed, (_, scales, zero_points) = y.producer(), _stored(weight)
    groups, channels = transposed.attributes.get_int("group", 1), len(blocks.weight)

    def constant(name: str, value: Any) -> Any:
        return op.initializer(ir.tensor(value), name=f"{weight.name}.blocks.{name}")

    def of_channels(values: Any) -> Any:
        """One for each channel of the result, or for all, from those of the output channels or the groups."""
        return values if values.size == 1 else np.repeat(values, channels // values.size)

    if scales.size > 1 and groups > 1:  # each group has its own, once for each of its input channels
        scales, zero_points = (each.reshape(groups, -1)[:, 0] for each in (scales, zero_points))
    inputs = [
        constant("weight", blocks.weight.contiguous().numpy()),
        constant("scale", of_channels(scales)),
        constant("zero_point", of_channels(zero_points)),
    ]
    axis = {"axis": 0} if scales.size > 1 else {}
    bias = transposed.inputs[2] if len(transposed.inputs) > 2 else None
    values = ir.convenience.get_const_tensor(bias) if bias is not None else None
    biases = [] if values is None else [constant("bias", np.repeat(values.numpy(), blocks.block**2))]
    pads = [*blocks.before, *blocks.after]
    return op.Conv(x, op.DequantizeLinear(*inputs, **axis), *biases, pads=pads, group=groups)


def _cut(op: Any, pixels: Any, blocks: SubPixels) -> Any:
    """Cuts the edges off."""
    starts = [*blocks.lead]
    ends = [-last if last else np.iinfo(np.int64).max for last in blocks.tail]
    return op.Slice(pixels, *(op.Constant(value_ints=each) for each in (starts, ends, [2, 3])))


def as_blocks(model: ir.Model) -> ir.Model:
    """Rewrites each transposed convolution whose weight is int8 and whose result is rounded."""
    return rewrite(model, pattern_rewrite_rules=[_AsBlocks.rule(), _AsBlocksWithRelu.rule()])
