"""Recognizes dropout, stochastic depth and detaching, which do nothing in eval mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torchvision.ops import StochasticDepth

from qat_lightning.base.torch_internals import Dropout, tree_map_only
from qat_lightning.modes.graph.nodes import module_of


def remove_dropout(graph_module: fx.GraphModule) -> None:
    """Removes every dropout from a graph that will only evaluate; the caller recompiles."""
    for node in _dropouts(graph_module):
        (source,) = node.all_input_nodes
        node.replace_all_uses_with(source)
        graph_module.graph.erase_node(node)


def _dropouts(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if is_dropout(graph_module, node)]


def is_dropout(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is a dropout, or detaches: it returns its input in eval mode."""
    module = module_of(graph_module, node)
    # timm is optional, so its DropPath is recognized by name.
    drops = isinstance(module, Dropout | StochasticDepth) or type(module).__name__ == "DropPath"
    return drops or node.target is detached


def detached(x: Any) -> Any:
    """Returns `x` without its gradient, as it leaves `torch.no_grad()`; what is no tensor, as it is."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, x)
