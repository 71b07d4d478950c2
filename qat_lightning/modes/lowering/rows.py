"""Weights of embeddings: stored as int8, and dequantized row by row where they are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.modes.graph.nodes import module_of


class RowTable(nn.Module):
    """Looks up rows of an int8 weight, and returns them as floats.

    Args:
        weight: The integers, with the `scale`, `zero_point` and `axis` of their qparams.
    """

    def __init__(self, weight: Any) -> None:
        super().__init__()
        rows = len(weight.int8)
        self.register_buffer("int8", weight.int8)
        self.register_buffer("scale", _for_each_row(weight.scale, rows).float())
        self.register_buffer("zero_point", _for_each_row(weight.zero_point, rows).to(torch.int8))

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        steps = self._of("int8", places).float() - self._of("zero_point", places).float()
        return steps * self._of("scale", places)

    def _of(self, name: str, places: torch.Tensor) -> torch.Tensor:
        return F.embedding(places, self.get_buffer(name))


def _for_each_row(value: Any, rows: int) -> torch.Tensor:
    """Returns one number for each row, as a column."""
    return torch.as_tensor(value).view(-1, 1).expand(rows, 1).clone()


def hold_rows(graph_module: fx.GraphModule, stored: type[nn.Module]) -> None:
    """Lets embeddings look up the rows of int8 weights instead of dequantizing all, in place.

    Args:
        graph_module: A graph in which modules of the type `stored` hold weights as int8.
        stored: That type. Its objects have the attributes that :class:`RowTable` reads.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        weight = node.args[1] if node.target is F.embedding else node
        module = module_of(graph_module, weight)
        if weight is node or not isinstance(module, stored):
            continue
        name = f"{weight.target!s}_rows"
        graph_module.add_submodule(name, RowTable(module))
        with graph.inserting_before(node):
            rows = graph.call_module(name, node.args[:1])
        rows.meta = dict(node.meta)
        node.replace_all_uses_with(rows)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
