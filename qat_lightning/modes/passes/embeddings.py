"""Writes an embedding as a function of its weight, so that the weight can be rounded."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.modes.graph.nodes import module_of
from qat_lightning.modes.passes.declare import declared_rule
from qat_lightning.modes.targets.rules import Kind


def expose_weights(graph_module: fx.GraphModule, scopes: dict[str, Any]) -> None:
    """Replaces each such `nn.Embedding` by `F.embedding` and a read of its weight, in place.

    Args:
        graph_module: The traced network, whose declared operations are marked.
        scopes: The scopes of its nodes. Those of the new nodes are added.

    Raises:
        ValueError: An operation with such a rule is no embedding, or one with further options.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        rule = declared_rule(node)
        if rule is None or rule.kind is not Kind.LOOKS_UP:
            continue
        layer = module_of(graph_module, node)
        name = str(node.target)
        if type(layer) is not nn.Embedding or layer.max_norm is not None or layer.sparse:
            raise ValueError(
                f"operations says of {name!r} that it returns 'rows' of its weight. That is for nn.Embedding "
                f"without max_norm and without sparse gradients, but it is {layer or 'a function'}."
            )
        with graph.inserting_before(node):
            weight = graph.get_attr(f"{name}.weight")
            options = (layer.padding_idx, None, 2.0, layer.scale_grad_by_freq, False)
            found = graph.call_function(F.embedding, (node.all_input_nodes[0], weight, *options))
        found.meta = dict(node.meta)
        scopes[found.name] = (name, nn.Embedding)
        node.replace_all_uses_with(found)
        graph.erase_node(node)
    graph_module.recompile()
