"""Writes a SiLU as a product with a sigmoid, for backends that have int8 kernels for these two alone."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.modes.graph.nodes import call_target
from qat_lightning.modes.passes.declare import declared_rule
from qat_lightning.modes.passes.qconfigs import QConfigs


def decompose_silu(graph_module: fx.GraphModule, qconfigs: QConfigs) -> None:
    """Replaces each SiLU of a graph by `x * sigmoid(x)`, in place."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        is_silu = call_target(graph_module, node) in (nn.SiLU, F.silu)
        if not is_silu or qconfigs.of(node) is None or declared_rule(node) is not None:
            continue
        (x,) = node.all_input_nodes
        with graph.inserting_before(node):
            sigmoid = graph.call_function(torch.sigmoid, (x,))
            product = graph.call_function(operator.mul, (x, sigmoid))
        sigmoid.meta, product.meta = dict(node.meta), dict(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    graph_module.recompile()
