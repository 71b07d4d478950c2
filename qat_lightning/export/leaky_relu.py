"""Writes a PReLU with a single slope as a LeakyReLU, for which ONNX Runtime has an int8 kernel."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern, rewrite


class _AsLeakyRelu(pattern.RewriteRuleClassBase):
    def pattern(self, op: Any, x: Any, slope: Any) -> Any:
        return op.PRelu(x, slope)

    def check(self, context: Any, x: Any, slope: Any) -> Any:
        result = pattern.MatchResult()
        return result if _constant(slope) is not None else result.fail("it has several slopes")

    def rewrite(self, op: Any, x: Any, slope: Any) -> Any:
        return op.LeakyRelu(x, alpha=_constant(slope))


def _constant(slope: Any) -> float | None:
    """Returns the only number of a constant; None if it is not constant, or has several."""
    tensor = ir.convenience.get_const_tensor(slope)
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def as_leaky_relus(model: ir.Model) -> ir.Model:
    """Rewrites each PReLU with a single slope."""
    return rewrite(model, pattern_rewrite_rules=[_AsLeakyRelu.rule()])
