"""Marks the operations that a user declared, before any other pass."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from qat_lightning.modes.graph.functions import node_function
from qat_lightning.modes.targets.declared import DECLARED
from qat_lightning.modes.targets.rules import Rule

_RULE = "declared"


def declare(graph_module: fx.GraphModule, operations: Mapping[str, str]) -> None:
    """Gives each node that calls a declared module or function its rule, in place.

    Args:
        graph_module: The traced network.
        operations: What is declared, by the name of a module or function.
    """
    for node in graph_module.graph.nodes:
        called = str(node.target) if node.op == "call_module" else node_function(node)
        if called is not None and called in operations:
            node.meta[_RULE] = DECLARED[operations[called]]


def declared_rule(node: fx.Node) -> Rule | None:
    """Returns the rule that a user declared for what a node calls."""
    rule: Rule | None = node.meta.get(_RULE)
    return rule
