"""Tells which nodes of a graph are floating-point tensors, and which are sizes, lengths, ids and masks.

A capture knows. After a symbolic trace, sizes are recognized by where they come from; a fake-quantize that
never sees a floating-point tensor passes everything on, and is removed before conversion.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qat_lightning.modes.graph.nodes import SPLITS

_OF_TENSORS = frozenset({"size", "dim", "numel", "ndimension", "element_size", "stride", "data_ptr", "item"})
_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "layout"})
_ON_NUMBERS: frozenset[Any] = frozenset(
    {
        *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv),
        *(operator.mod, operator.neg, operator.pow, operator.eq, operator.ne, operator.lt, operator.gt),
        *(operator.le, operator.ge, operator.and_, operator.or_, min, max, int, float, bool, len, torch.Size),
    }
)


class Tensors:
    """Knows which nodes of a graph are tensors."""

    def __init__(self) -> None:
        self._numbers: dict[fx.Node, bool] = {}

    def is_floating(self, node: fx.Node) -> bool:
        """Whether a node is a floating-point tensor, as far as that is known, and not a tuple of parts."""
        if node.target in SPLITS:
            return False
        return bool(node.meta.get("floating", True)) and not self._is_number(node)

    def _is_number(self, node: fx.Node) -> bool:
        """Whether a node holds no tensor, but a size or what was computed from sizes."""
        if node not in self._numbers:
            self._numbers[node] = _reads_metadata(node) or (
                node.target in _ON_NUMBERS
                and bool(node.all_input_nodes)
                and all(self._is_number(source) for source in node.all_input_nodes)
            )
        return self._numbers[node]


def _reads_metadata(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _OF_TENSORS
    return node.target is getattr and node.args[1] in _ATTRIBUTES
