"""Removes the rounding of values that are no floating-point tensors: sizes, lengths, ids and masks.

A capture knows which they are. After a symbolic trace, the fake-quantizes that never see a floating-point
tensor pass everything on, and are removed before conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import fx

from qat_lightning.modes.graph.nodes import fake_quantize_of, module_of


def keep_integers(prepared: fx.GraphModule) -> None:
    """Removes the fake-quantizes after nodes that a capture knows to be something else, in place."""
    _remove(prepared, lambda node: not node.all_input_nodes[0].meta.get("floating", True))


def drop_unseen(prepared: fx.GraphModule, unseen: Collection[str]) -> None:
    """Removes the fake-quantizes with the names `unseen`, in place, before conversion."""
    modules = {module for name, module in prepared.named_modules() if name in unseen}
    _remove(prepared, lambda node: module_of(prepared, node) in modules)


def _remove(prepared: fx.GraphModule, is_removed: Callable[[fx.Node], bool]) -> None:
    for node in list(prepared.graph.nodes):
        if fake_quantize_of(prepared, node) is not None and is_removed(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            prepared.graph.erase_node(node)
    prepared.delete_all_unused_submodules()
    prepared.recompile()
