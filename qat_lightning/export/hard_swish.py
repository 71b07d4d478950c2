"""Rewrites a hard-swish as a product of integers, for runtimes without an int8 kernel for it.

`x * clip(x + 3, 0, 6) / 6` between two grids needs no float: where 3 is `n` steps of the grid of `x`, and 0
the integer `z`, the second factor is what the integers of `x`, clipped to `z ± n`, are on another grid: the
one whose zero point is `z - n` and whose scale is `1 / 2n`. Both factors are bytes then, and their product is
one that ONNX Runtime computes in int8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern, rewrite

from qat_lightning.modes.layers.input_qparams import HARD_SWISH_LIMIT

_GREATEST = 255
_TOLERANCE = 1e-3
"""In steps of the grid: what float32 makes of a whole number of up to 255."""


class _AsProduct(pattern.RewriteRuleClassBase):
    def pattern(self, op: Any, x: Any) -> Any:
        return op.HardSwish(x)

    def check(self, context: Any, x: Any) -> Any:
        result = pattern.MatchResult()
        return result if _grid(x) else result.fail("-3 and 3 are no bytes of its input's grid")

    def rewrite(self, op: Any, x: Any) -> Any:
        grid = _grid(x)
        assert grid is not None
        steps, zero_point = grid

        def constant(name: str, value: Any) -> Any:
            return op.initializer(ir.tensor(value), name=f"{x.name}.hard_sigmoid.{name}")

        low = constant("zero_point", np.uint8(zero_point - steps))
        high = constant("max", np.uint8(min(zero_point + steps, _GREATEST)))
        clipped = op.Clip(x.producer().inputs[0], low, high)
        return op.Mul(x, op.DequantizeLinear(clipped, constant("scale", np.float32(1 / (2 * steps))), low))


def _grid(x: Any) -> tuple[int, int] | None:
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
