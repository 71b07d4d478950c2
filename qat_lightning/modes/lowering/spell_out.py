"""Rounds the results of operations that only move values, too, where a file or a kernel needs to see it.

In training this would change nothing: the values are those of a rounded tensor.
"""

from __future__ import annotations

import operator

from torch import fx

from qat_lightning.modes.graph.nodes import SPLITS, fake_quantize_of
from qat_lightning.modes.passes.insert import MOVING


def spell_out(graph_module: fx.GraphModule) -> None:
    """Calls the fake-quantize of the input after each such operation, in place."""
    moving = graph_module.meta.get(MOVING, ())
    for node in list(graph_module.graph.nodes):
        source = _rounding_behind(graph_module, node) if node.name in moving else None
        if source is None or _is_split(node):
            continue
        with graph_module.graph.inserting_after(node):
            call = graph_module.graph.call_module(str(source.target), (node,))
        node.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
    graph_module.recompile()


def _rounding_behind(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Returns the rounding that the first input of a node comes from, past a split; None if there is none."""
    source = node.all_input_nodes[0]
    while source.all_input_nodes and _is_split(source):
        source = source.all_input_nodes[0]
    return source if fake_quantize_of(graph_module, source) is not None else None


def _is_split(node: fx.Node) -> bool:
    """Whether the result of a node is a tuple."""
    taken_apart = bool(node.users) and all(user.target is operator.getitem for user in node.users)
    return taken_apart or node.target in SPLITS
