"""Simplifies an exported QDQ graph so that runtimes recognize its int8 operations.

The rewrites are onnxscript rules; the other simplifications are onnx-ir passes.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.rewriter import pattern, rewrite


class _RoundedTwice(pattern.RewriteRuleClassBase):
    """Removes a quantize right after a dequantize with the same qparams."""

    def pattern(self, op: Any, integers: Any, s1: Any, z1: Any, s2: Any, z2: Any) -> Any:
        return op.QuantizeLinear(op.DequantizeLinear(integers, s1, z1), s2, z2)

    def check(self, context: Any, integers: Any, s1: Any, z1: Any, s2: Any, z2: Any) -> Any:
        result = pattern.MatchResult()
        if not (_same(s1, s2) and _same(z1, z2)):
            return result.fail("the qparams differ")
        return result

    def rewrite(self, op: Any, integers: Any, **_: Any) -> Any:
        return op.Identity(integers)


class _MeanOfImage(pattern.RewriteRuleClassBase):
    """Turns a mean over height and width into a global average pooling, which has int8 kernels."""

    def pattern(self, op: Any, x: Any, axes: Any) -> Any:
        return op.ReduceMean(x, axes, _outputs=["mean"])

    def check(self, context: Any, x: Any, axes: Any, mean: Any) -> Any:
        result = pattern.MatchResult()
        found = ir.convenience.get_const_tensor(axes)
        if found is None or x.shape is None or len(x.shape) != 4:
            return result.fail("not an image")
        if sorted(int(axis) % 4 for axis in found.numpy()) != [2, 3]:
            return result.fail("not a mean over height and width")
        return result

    def rewrite(self, op: Any, x: Any, axes: Any, mean: Any) -> Any:
        pooled = op.GlobalAveragePool(x)
        keeps = mean.producer().attributes.get_int("keepdims", 1)
        return pooled if keeps else op.Flatten(pooled, axis=1)


class _RoundedThenFlattened(pattern.RewriteRuleClassBase):
    """Swaps a flatten and the quantize after it, so that the pooling before them runs in int8."""

    def pattern(self, op: Any, x: Any, scale: Any, zero_point: Any) -> Any:
        return op.QuantizeLinear(op.Flatten(op.GlobalAveragePool(x), axis=1), scale, zero_point)

    def rewrite(self, op: Any, x: Any, scale: Any, zero_point: Any) -> Any:
        return op.Flatten(op.QuantizeLinear(op.GlobalAveragePool(x), scale, zero_point), axis=1)


_RULES = pattern.RewriteRuleSet([_RoundedTwice.rule(), _MeanOfImage.rule()])
_LATER_RULES = pattern.RewriteRuleSet([_RoundedThenFlattened.rule()])
_PASSES = ir.passes.Sequential(
    passes.IdentityEliminationPass(),
    passes.RemoveUnusedNodesPass(),
    passes.DeduplicateInitializersPass(),
    passes.ClearMetadataAndDocStringPass(),  # these name files of the exporting machine
)


def simplify(model: ir.Model) -> ir.Model:
    """Applies all rewrites and passes."""
    for rules in (_RULES, _LATER_RULES):
        model = rewrite(model, pattern_rewrite_rules=rules)
    model = _PASSES(model).model
    _separate_zero_points(model.graph)
    return model


def _separate_zero_points(graph: ir.Graph) -> None:
    """Gives each weight its own zero point.

    On CPUs without VNNI, ONNX Runtime can convert weights to unsigned bytes, to avoid overflow. It fails if
    two weights share a zero point.
    """
    for node in [node for node in graph if node.op_type == "DequantizeLinear"]:
        weight, zero = node.inputs[0], node.inputs[-1]
        assert weight is not None
        assert zero is not None
        if weight.const_value is not None and len(node.inputs) == 3 and len(zero.uses()) > 1:
            name = f"{weight.name}.zero_point"
            if name in graph.initializers:  # two layers with other scales may have the same int8 weights
                name = f"{weight.name}.{node.outputs[0].name}.zero_point"
            own = ir.Value(name=name, const_value=zero.const_value)
            own.shape, own.type = zero.shape, zero.type
            graph.register_initializer(own)
            node.replace_input_with(2, own)


def _same(one: Any, other: Any) -> bool:
    first, second = map(ir.convenience.get_const_tensor, (one, other))
    if first is None or second is None:
        return one is other
    return first.dtype == second.dtype and bool((first.numpy() == second.numpy()).all())
