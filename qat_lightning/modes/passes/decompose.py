"""Writes attention as two products and a softmax, so that the products can be int8.

In float the two forms compute the same. In training the products keep the matrix of weights, which
`scaled_dot_product_attention` need not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.modes.graph.attention import attention_weights
from qat_lightning.modes.graph.by_mode import ByMode, filled
from qat_lightning.modes.graph.nodes import module_of
from qat_lightning.modes.passes.qconfigs import QConfigs

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def decompose_attention(graph_module: fx.GraphModule, qconfigs: QConfigs) -> None:
    """Replaces each call of `scaled_dot_product_attention` in a graph by its parts, in place."""
    for node in list(graph_module.graph.nodes):
        given = _arguments(graph_module, node)
        if given is None or given.get("enable_gqa") or qconfigs.of(node) is None:
            continue
        with graph_module.graph.inserting_before(node):
            result = _parts(graph_module, f"{node.name}_dropout", given)
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph_module.graph.erase_node(node)
    graph_module.recompile()


def _arguments(graph_module: fx.GraphModule, node: fx.Node) -> dict[str, Any] | None:
    """Returns the arguments of a call in training mode; None for a call of something else."""
    module = module_of(graph_module, node)
    args, kwargs = node.args, node.kwargs
    if isinstance(module, ByMode) and module.function is F.scaled_dot_product_attention:
        args, kwargs = filled(module.train_arguments, node.all_input_nodes)
    elif node.target is not F.scaled_dot_product_attention:
        return None
    return dict(zip(_ARGUMENTS, args, strict=False)) | dict(kwargs)


def _parts(graph_module: fx.GraphModule, dropout: str, given: dict[str, Any]) -> fx.Node:
    """Adds the parts of attention to a graph, and returns their result."""
    graph, query = graph_module.graph, given["query"]
    key = graph.call_method("transpose", (given["key"], -2, -1))
    scores = graph.call_function(torch.matmul, (query, key))
    width = graph.call_method("size", (query, -1))
    options = given.get("attn_mask"), given.get("scale"), given.get("is_causal", False), width
    weights = graph.call_function(attention_weights, (scores, *options))
    if given.get("dropout_p"):
        graph_module.add_submodule(dropout, nn.Dropout(given["dropout_p"]))
        weights = graph.call_module(dropout, (weights,))
    return graph.call_function(torch.matmul, (weights, given["value"]))
