"""Computes what depends on parameters and buffers alone, such as a weight that a forward computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


class Constants:
    """The values of the nodes of a graph that do not depend on its inputs.

    Args:
        graph_module: The graph, in the mode whose values are wanted.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._interpreter = fx.Interpreter(graph_module)
        self._values: dict[fx.Node, Any] = {}

    @torch.no_grad()
    def of(self, node: fx.Node) -> Any:
        """Returns the value of a node; None if it depends on the inputs of the graph."""
        if node.op in ("placeholder", "output"):
            return None
        if node not in self._values:
            known = {source: self.of(source) for source in node.all_input_nodes}
            depends = any(value is None for value in known.values())
            self._values[node] = None if depends else self._run(node, known)
        return self._values[node]

    def _run(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        return getattr(self._interpreter, node.op)(node.target, args, kwargs)
