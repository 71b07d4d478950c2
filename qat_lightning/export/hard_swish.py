"""Rewrites a hard-swish as a product of two int8 tensors, for runtimes without an int8 kernel for it.

A hard-swish is `x * h(x)` with `h(x) = clip(x + 3, 0, 6) / 6`. Let `x` be quantized as integers `q` with
scale `s` and zero point `z`, and let 3 be exactly `n` steps: `3 = n * s`. Then
`h(x) = (clip(q, z - n, z + n) - (z - n)) / 2n`. So `h(x)` is quantized, too: its integers are the clipped
`q`, its zero point is `z - n` and its scale is `1 / 2n`. ONNX Runtime computes `x * h(x)` in int8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern, rewrite

from qat_lightning.modes.layers.input_qparams import HARD_SWISH_LIMIT

_MAX_UINT8 = 255
_TOLERANCE = 1e-3
"""By how much a whole number of steps may be off, because the scale is a float32."""


class _AsProduct(pattern.RewriteRuleClassBase):
    def pattern(self, op: Any, x: Any) -> Any:
        return op.HardSwish(x)

    def check(self, context: Any, x: Any) -> Any:
        result = pattern.MatchResult()
        found = _steps_and_zero_point(x)
        return result if found else result.fail("the qparams of its input do not represent -3 and 3")

    def rewrite(self, op: Any, x: Any) -> Any:
        found = _steps_and_zero_point(x)
        assert found is not None
        steps, zero_point = found

        def constant(name: str, value: Any) -> Any:
            return op.initializer(ir.tensor(value), name=f"{x.name}.hard_sigmoid.{name}")

        low = constant("zero_point", np.uint8(zero_point - steps))
        high = constant("max", np.uint8(min(zero_point + steps, _MAX_UINT8)))
        clipped = op.Clip(x.producer().inputs[0], low, high)
        return op.Mul(x, op.DequantizeLinear(clipped, constant("scale", np.float32(1 / (2 * steps))), low))


def _steps_and_zero_point(x: Any) -> tuple[int, int] | None:
    """Returns the steps from 0 to 3 and the zero point of `x`, if its qparams represent -3 and 3."""
    node = x.producer()
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) != 3:
        return None
    scale, zero_point = map(ir.convenience.get_const_tensor, node.inputs[1:])
    if scale is None or zero_point is None or scale.size != 1 or zero_point.dtype != ir.DataType.UINT8:
        return None
    steps, zero = HARD_SWISH_LIMIT / float(scale.numpy()), int(zero_point.numpy())
    fits = abs(steps - round(steps)) <= _TOLERANCE and 1 <= round(steps) <= zero
    return (round(steps), zero) if fits else None


def as_products(model: ir.Model) -> ir.Model:
    """Rewrites each hard-swish whose input qparams represent -3 and 3."""
    return rewrite(model, pattern_rewrite_rules=[_AsProduct.rule()])
