"""Removes the rounding of what turned out to be no floating-point tensor, before conversion.

A capture knows which values are sizes, lengths, ids and masks, and rounds none of them. After a symbolic
trace some may have a fake-quantize, which passes them on.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from qat_lightning.modes.graph.nodes import module_of


def drop_unseen(prepared: fx.GraphModule, unseen: Collection[str]) -> None:
    """Removes the fake-quantizes with the names `unseen`, in place, before conversion."""
    modules = {module for name, module in prepared.named_modules() if name in unseen}
    for node in list(prepared.graph.nodes):
        if node.op == "call_module" and module_of(prepared, node) in modules:
            node.replace_all_uses_with(node.all_input_nodes[0])
            prepared.graph.erase_node(node)
    prepared.delete_all_unused_submodules()
    prepared.recompile()
