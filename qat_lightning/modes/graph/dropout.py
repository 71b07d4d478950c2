"""Removes the rounding after dropout, stochastic depth and detaching, which do nothing in an int8 network.

torch.ao gives the output of a dropout a fake-quantize with qparams of its own, and leaves these qparams out
of the int8 network. In eval mode the prepared network would clip values that the int8 network does not clip.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torchvision.ops import StochasticDepth

from qat_lightning.base.torch_internals import Dropout, tree_map_only
from qat_lightning.modes.graph.nodes import fake_quantize_of, module_of


def keep_qparams_through_dropout(prepared: fx.GraphModule) -> None:
    """Removes the fake-quantizes after dropouts whose input is rounded, in place.

    An operation that shared the qparams of a removed fake-quantize, such as a pool, shares the input's
    instead.
    """
    for node in _dropouts(prepared):
        if fake_quantize_of(prepared, node.all_input_nodes[0]) is not None:
            input_name = node.all_input_nodes[0].target
            for user in list(node.users):
                if fake_quantize_of(prepared, user) is not None:
                    _call_instead(prepared, module_of(prepared, user), input_name)
                    user.replace_all_uses_with(node)
                    prepared.graph.erase_node(user)
    prepared.delete_all_unused_submodules()
    prepared.recompile()


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


def _call_instead(graph_module: fx.GraphModule, old: nn.Module | None, new: Any) -> None:
    """Replaces every call of the module `old` by a call of the module with the name `new`."""
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and module_of(graph_module, node) is old:
            node.target = new
