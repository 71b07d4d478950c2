"""Rounds the results of operations that only move values, too, where a file or a kernel needs to see it.

In training this would change nothing: the values are those of a rounded tensor.
"""

from __future__ import annotations

from torch import fx

from qat_lightning.modes.graph.nodes import fake_quantize_of
from qat_lightning.modes.passes.insert import MOVING


def spell_out(graph_module: fx.GraphModule) -> None:
    """Calls the fake-quantize of the input after each such operation, in place."""
    moving = graph_module.meta.get(MOVING, ())
    for node in list(graph_module.graph.nodes):
        source = node.all_input_nodes[0] if node.name in moving else None
        if source is None or fake_quantize_of(graph_module, source) is None:
            continue
        with graph_module.graph.inserting_after(node):
            call = graph_module.graph.call_module(str(source.target), (node,))
        node.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
    graph_module.recompile()
