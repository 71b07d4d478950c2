"""What a forward overwrites: whoever reads the tensor later reads the result, and a graph has to say so.

Rounding puts another tensor where the overwritten one was, and int8 operations overwrite nothing, so that a
later reader would see the old values. A trace records `a += b` as `a + b`, so that it is none of these.
"""

from __future__ import annotations

from torch import fx, nn


def redirect_later_reads(network: nn.Module, graph: fx.Graph) -> None:
    """Lets later readers of an overwritten tensor read the result instead, in place."""
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
