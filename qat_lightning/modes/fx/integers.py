"""Removes the rounding of values that are no floating-point tensors: sizes, lengths, ids and masks."""

from __future__ import annotations

from torch import fx

from qat_lightning.modes.graph.nodes import fake_quantize_of


def keep_integers(prepared: fx.GraphModule) -> None:
    """Removes the fake-quantizes after nodes that a capture knows to be something else, in place."""
    for node in list(prepared.graph.nodes):
        if fake_quantize_of(prepared, node) is not None:
            (source,) = node.all_input_nodes
            if not source.meta.get("floating", True):
                node.replace_all_uses_with(source)
                prepared.graph.erase_node(node)
    prepared.delete_all_unused_submodules()
    prepared.recompile()
