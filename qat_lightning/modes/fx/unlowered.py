"""Keeps operations float in the int8 network if torch.ao's int8 versions do not use the trained qparams.

- `x + 1` and `x * 2`, with a number: the int8 versions derive the qparams of the output from those of the
  input, and round the number.
- `torch.cat` and `torch.stack`: the int8 version takes the qparams of its first input, which may differ from
  those of the others.

In float, between dequantize and quantize, these operations compute what was trained.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.modes.graph.nodes import SHARES_INPUT_QPARAMS, call_target, fake_quantize_of, module_of


def add_number(x: torch.Tensor, number: Any) -> torch.Tensor:
    """Returns `x + number`; torch.ao knows no int8 version of this function."""
    return x + number


def multiply_by_number(x: torch.Tensor, number: Any) -> torch.Tensor:
    """Returns `x * number`; torch.ao knows no int8 version of this function."""
    return x * number


def concatenate(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Does the same as `torch.cat`; torch.ao knows no int8 version of this function."""
    return torch.cat(tensors, dim)


def stack(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Does the same as `torch.stack`; torch.ao knows no int8 version of this function."""
    return torch.stack(tensors, dim)


IN_FLOAT: dict[Any, Any] = {torch.cat: concatenate, torch.stack: stack}
"""Functions, and the same functions under names that torch.ao does not know."""
_WITH_NUMBER: dict[Any, Any] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add), add_number),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), multiply_by_number),
}


def keep_unlowered(prepared: fx.GraphModule) -> None:
    """Replaces operations in a prepared graph by those of this file, in place, before conversion."""
    for node in prepared.graph.nodes:
        if takes_a_number(node):
            left, right = node.args
            node.target = _WITH_NUMBER[node.target]
            node.args = (left, right) if isinstance(left, fx.Node) else (right, left)
        elif node.target in IN_FLOAT and not _has_equal_qparams(prepared, node):
            node.target = IN_FLOAT[node.target]
    prepared.recompile()


def takes_a_number(node: fx.Node) -> bool:
    """Whether a node is a sum or a product of a tensor and a number."""
    operands = [isinstance(operand, fx.Node) for operand in node.args]
    return node.target in _WITH_NUMBER and not node.kwargs and len(operands) == 2 and sum(operands) == 1


def _has_equal_qparams(prepared: fx.GraphModule, node: fx.Node) -> bool:
    return len({_qparams_source(prepared, tensor) for tensor in node.all_input_nodes}) <= 1


def _qparams_source(prepared: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Returns the fake-quantize whose qparams the int8 tensor has; a reshape passes on those of its input."""
    fake_quantize = fake_quantize_of(prepared, node)
    if fake_quantize is None:
        return module_of(prepared, node)
    source = node.all_input_nodes[0]
    before = source.all_input_nodes[0] if source.all_input_nodes else source
    if (
        call_target(prepared, source) in SHARES_INPUT_QPARAMS
        and fake_quantize_of(prepared, before) is not None
    ):
        return _qparams_source(prepared, before)
    return fake_quantize
