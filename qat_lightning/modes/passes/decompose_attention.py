"""Writes attention as two products and what is around them, so that the products can be int8.

In float the two forms compute the same. In training the products keep the matrix of weights, which
`scaled_dot_product_attention` need not.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.modes.functions.attention import (
    attend,
    attention_weights,
    join_heads,
    merged_mask,
    split_heads,
)
from qat_lightning.modes.graph.by_mode import ByMode, filled
from qat_lightning.modes.graph.nodes import module_of
from qat_lightning.modes.passes.declare import declared_rule
from qat_lightning.modes.passes.qconfigs import QConfigs

_ARGUMENTS = {
    F.scaled_dot_product_attention: ("query", "key", "value", "mask", "dropout", "is_causal", "scale"),
    attend: ("projected", "masks", "biases"),
}
_OTHER_NAMES = {"attn_mask": "mask", "dropout_p": "dropout"}


def decompose_attention(graph_module: fx.GraphModule, qconfigs: QConfigs) -> None:
    """Replaces each call of attention in a graph by its parts, in place."""
    for node in list(graph_module.graph.nodes):
        function, given = _call(graph_module, node)
        whole = given.pop("enable_gqa", False) or given.get("weights") or declared_rule(node) is not None
        if function is None or whole or qconfigs.of(node) is None:
            continue
        with graph_module.graph.inserting_before(node):
            if function is attend:
                result = _between_projections(graph_module, node, given)
            else:
                result = _products(graph_module, node, **given)
        node.replace_all_uses_with(result)
        graph_module.graph.erase_node(node)
    graph_module.recompile()


def _call(graph_module: fx.GraphModule, node: fx.Node) -> tuple[Any, dict[str, Any]]:
    """Returns the function of attention that a node calls, and its arguments in training mode."""
    module = module_of(graph_module, node)
    function, args, kwargs = node.target, node.args, node.kwargs
    if isinstance(module, ByMode):
        function = module.function
        args, kwargs = filled(module.train_arguments, node.all_input_nodes)
    if function not in _ARGUMENTS:
        return None, {}
    named = {_OTHER_NAMES.get(name, name): value for name, value in kwargs.items()}
    return function, dict(zip(_ARGUMENTS[function], args, strict=False)) | named


def _between_projections(graph_module: fx.GraphModule, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    """Adds what `nn.MultiheadAttention` does between its projections."""
    graph, projected, masks = graph_module.graph, given["projected"], given["masks"]
    options = given["biases"], given["heads"], given["batch_first"], given["add_zero"]
    heads = graph.call_function(split_heads, (projected, *options))
    query, key, value = (graph.call_function(operator.getitem, (heads, i)) for i in range(3))
    causal = given["is_causal"] and masks[0] is None
    mask = None
    if not causal and any(each is not None for each in masks):
        mask = graph.call_function(merged_mask, (masks, query, key))
    out = _products(graph_module, node, query, key, value, mask, given["dropout"], causal)
    joined = graph.call_function(join_heads, (out, projected[0], given["batch_first"]))
    for user in list(node.users):
        if user.target is operator.getitem:  # the second result is None
            user.replace_all_uses_with(joined)
            graph.erase_node(user)
    return joined


def _products(
    graph_module: fx.GraphModule,
    node: fx.Node,
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> fx.Node:
    """Adds two products and a softmax, as `scaled_dot_product_attention` computes them."""
    graph = graph_module.graph
    key = graph.call_method("transpose", (key, -2, -1))
    scores = graph.call_function(torch.matmul, (query, key))
    width = graph.call_method("size", (query, -1))
    weights = graph.call_function(attention_weights, (scores, mask, scale, is_causal, width))
    if dropout:
        name = f"{node.name}_dropout"
        graph_module.add_submodule(name, nn.Dropout(dropout))
        weights = graph.call_module(name, (weights,))
    result = graph.call_function(torch.matmul, (weights, value))
    result.meta = dict(node.meta)
    return result
