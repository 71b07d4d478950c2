"""Operations that stay float in the int8 network: torch.ao's int8 ones do not keep to the trained grid.

- With a number, `x + 1` and `x * 2`, they take no grid. They derive one from the input's, and round the
  number.
- A concatenation takes the grid of its first input, which need not be that of the others.

Float, between dequantize and quantize, they compute what was trained.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.modes.graph.nodes import SHARES_INPUT_QPARAMS, call_target, fake_quantize_of, module_of


def add_number(x: torch.Tensor, number: Any) -> torch.Tensor:
    """`x + number`, under a name for which torch.ao knows no int8 operation."""
    return x + number


def multiply_by_number(x: torch.Tensor, number: Any) -> torch.Tensor:
    """`x * number`, likewise."""
    return x * number


def concatenate(tensors: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """`torch.cat`, likewise."""
    return torch.cat(tensors, dim)


_WITH_NUMBER: dict[Any, Any] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add), add_number),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), multiply_by_number),
}


def keep_unlowered(prepared: fx.GraphModule) -> None:
    """Puts the operations of this file into a prepared graph, in place, before it is converted."""
    for node in prepared.graph.nodes:
        if node.target in _WITH_NUMBER and _takes_a_number(node):
            left, right = node.args
            node.target = _WITH_NUMBER[node.target]
            node.args = (left, right) if isinstance(left, fx.Node) else (right, left)
        elif node.target is torch.cat and not _on_one_grid(prepared, node):
            node.target = concatenate
    prepared.recompile()


def _takes_a_number(node: fx.Node) -> bool:
    return len(node.args) == 2 and not node.kwargs and sum(isinstance(a, fx.Node) for a in node.args) == 1


def _on_one_grid(prepared: fx.GraphModule, node: fx.Node) -> bool:
    return len({_grid(prepared, tensor) for tensor in node.all_input_nodes}) <= 1


def _grid(prepared: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The fake-quantize whose grid an int8 tensor has: a reshape passes its input's on."""
    grid = fake_quantize_of(prepared, node)
    if grid is None:
        return module_of(prepared, node)
    source = node.all_input_nodes[0]
    before = source.all_input_nodes[0] if source.all_input_nodes else source
    if (
        call_target(prepared, source) in SHARES_INPUT_QPARAMS
        and fake_quantize_of(prepared, before) is not None
    ):
        return _grid(prepared, before)
    return grid
