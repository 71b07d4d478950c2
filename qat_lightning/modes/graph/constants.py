"""Lets a graph return plain values, such as a batch size that its forward fixed beside tensors."""

from __future__ import annotations

from typing import Any

from torch import fx


def constant(value: Any) -> Any:
    """Returns `value`. torch.ao's prepare takes no output that is not a node."""
    return value


def wrap_returned_values(graph: fx.Graph) -> dict[str, Any]:
    """Replaces each plain value in a graph's output by a node that returns it, in place.

    Returns:
        The scopes of the new nodes.
    """
    output = next(iter(reversed(graph.nodes)))

    def wrapped(value: Any) -> Any:
        if isinstance(value, fx.Node) or value is None:
            return value
        with graph.inserting_before(output):
            node = graph.call_function(constant, (value,))
        node.meta["floating"] = False
        scopes[node.name] = ("", type(None))
        return node

    scopes: dict[str, Any] = {}
    output.args = fx.node.map_aggregate(output.args, wrapped)
    return scopes
