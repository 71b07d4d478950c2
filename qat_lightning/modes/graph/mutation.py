"""Makes in-place operations explicit in a graph: later readers of an overwritten tensor read the result.

A graph that is traced from `relu(x, inplace=True)` lets later operations read `x`. In a prepared network
rounding puts a new tensor in between, and int8 operations overwrite nothing, so that these operations would
read the old values. `a += b` needs no care: a trace records it as `a + b`.
"""

from __future__ import annotations

from torch import fx, nn


def redirect_later_reads(network: nn.Module, graph: fx.Graph) -> None:
    """Makes later readers of an overwritten tensor read the result of the operation instead, in place."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and _overwrites(network, node):
            for reader in list(source.users):
                if order[reader] > order[node]:
                    reader.replace_input_with(source, node)


def _overwrites(network: nn.Module, node: fx.Node) -> bool:
    """Whether `node` writes into its first argument."""
    if node.op == "call_module":
        return bool(getattr(network.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return bool(node.kwargs.get("inplace", False))
