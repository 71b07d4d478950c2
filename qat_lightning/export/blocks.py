"""Rewrites int8 transposed convolutions of images for runtimes without an int8 kernel for them.

A plain convolution makes the pixels as channels, and a DepthToSpace puts them side by side. Both runtimes
compute these with bytes. ONNX Runtime has no int8 kernel for a transposed convolution. OpenVINO has one, but
not for an input with a zero point, such as the result of a LeakyReLU.
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
    """Rewrites a transposed convolution whose result, or an activation of it, is rounded.

    Args:
        activation: What lies between the two; None for nothing.
        only_shifted: Whether to rewrite only those whose input has a zero point.
    """

    def __init__(self, activation: str | None, only_shifted: bool) -> None:
        super().__init__()
        self._activation, self._only_shifted = activation, only_shifted

    def pattern(self, op: Any, x: Any, weight: Any, scale: Any, zero_point: Any) -> Any:
        y = op.ConvTranspose(x, weight, _allow_other_inputs=True, _outputs=["y"])
        activated = y if self._activation is None else getattr(op, self._activation)(y)
        return op.QuantizeLinear(activated, scale, zero_point)

    def check(self, context: Any, x: Any, weight: Any, scale: Any, zero_point: Any, y: Any) -> Any:
        result = pattern.MatchResult()
        if self._only_shifted and not _is_shifted(x):
            return result.fail("there is an int8 kernel for it")
        return result if _blocks_of(weight, y) else result.fail("there is no plain convolution of blocks")

    def rewrite(self, op: Any, x: Any, weight: Any, scale: Any, zero_point: Any, y: Any) -> Any:
        blocks = _blocks_of(weight, y)
        assert blocks is not None
        pixels = _convolution(op, x, weight, y, blocks)
        if self._activation is not None:
            ((reader, _),) = y.uses()
            options = {name: each.value for name, each in reader.attributes.items()}
            pixels = getattr(op, self._activation)(pixels, **options)

        def rounded(value: Any) -> Any:
            return op.DequantizeLinear(op.QuantizeLinear(value, scale, zero_point), scale, zero_point)

        if blocks.block > 1:
            pixels = op.DepthToSpace(rounded(pixels), blocksize=blocks.block, mode="CRD")
        if any((*blocks.lead, *blocks.tail)):
            pixels = _cut(op, rounded(pixels), blocks)
        return op.QuantizeLinear(pixels, scale, zero_point)


def _is_shifted(x: Any) -> bool:
    """Whether the zero point of the input is not 0; OpenVINO then has no int8 transposed convolution."""
    node = x.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return False
    zero_point = ir.convenience.get_const_tensor(node.inputs[-1])
    return zero_point is not None and bool(zero_point.numpy().any())


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
    transposed, (_, scales, zero_points), count = y.producer(), _stored(weight), blocks.block**2

    def constant(name: str, value: Any) -> Any:
        return op.initializer(ir.tensor(value), name=f"{y.name}.blocks.{name}")  # a weight may be used twice

    inputs = [constant("weight", blocks.weight.numpy())]
    for name, values in (("scale", scales), ("zero_point", zero_points)):
        inputs.append(constant(name, values if values.ndim == 0 else np.repeat(values, count)))
    axis = {} if scales.ndim == 0 else {"axis": 0}
    bias = transposed.inputs[2] if len(transposed.inputs) > 2 else None
    values = ir.convenience.get_const_tensor(bias) if bias is not None else None
    biases = [] if values is None else [constant("bias", np.repeat(values.numpy(), count))]
    pads = [*blocks.before, *blocks.after]
    return op.Conv(x, op.DequantizeLinear(*inputs, **axis), *biases, pads=pads)


def _cut(op: Any, pixels: Any, blocks: SubPixels) -> Any:
    """Cuts the edges off."""
    starts = [*blocks.lead]
    ends = [-last if last else np.iinfo(np.int64).max for last in blocks.tail]
    return op.Slice(pixels, *(op.Constant(value_ints=each) for each in (starts, ends, [2, 3])))


def as_blocks(model: ir.Model, *, only_shifted: bool = False) -> ir.Model:
    """Rewrites transposed convolutions whose weight is int8 and whose result is rounded.

    Args:
        model: The graph.
        only_shifted: Whether to rewrite only those whose input has a zero point.
    """
    rules = [_AsBlocks.rule(activation, only_shifted) for activation in (None, "Relu", "LeakyRelu")]
    return rewrite(model, pattern_rewrite_rules=rules)
