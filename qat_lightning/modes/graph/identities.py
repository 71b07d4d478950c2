"""Removes `nn.Identity` from graphs: it would keep its neighbours from being fused."""

from __future__ import annotations

from torch import fx, nn

from qat_lightning.modes.graph.nodes import call_target


def erase_identities(network: nn.Module, graph: fx.Graph) -> None:
    """Removes the calls of `nn.Identity` from a graph of `network`, in place."""
    for node in list(graph.nodes):
        if call_target(network, node) is nn.Identity:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
