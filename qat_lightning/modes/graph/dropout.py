"""Dropout does nothing in an int8 network, so nothing may be rounded for its sake. Nor does stochastic depth.

torch.ao rounds the output of a dropout in training, on a grid of its own, and leaves that grid out of
the int8 network: in eval mode the prepared network would clip where the int8 one does not.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from qat_lightning.modes.graph.nodes import fake_quantize_of, module_of


def keep_qparams_through_dropout(prepared: fx.GraphModule) -> None:
    """Removes the fake-quantizes after dropouts whose input is rounded, in place.

    What shared the grid of one, such as a pool, shares the input's instead.
    """
    for node in _dropouts(prepared):
        if fake_quantize_of(prepared, node.all_input_nodes[0]) is not None:
            kept = node.all_input_nodes[0].target
            for user in list(node.users):
                if fake_quantize_of(prepared, user) is not None:
                    _call_instead(prepared, module_of(prepared, user), kept)
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
    return [node for node in graph_module.graph.nodes if _is_dropout(module_of(graph_module, node))]


def _is_dropout(module: nn.Module | None) -> bool:
    """Whether `module` returns its input as it is in eval mode; timm, which has one too, is optional."""
    return isinstance(module, _DropoutNd | StochasticDepth) or type(module).__name__ == "DropPath"


def _call_instead(graph_module: fx.GraphModule, old: nn.Module | None, kept: Any) -> None:
    """Lets every call of the module `old` be one of the module named `kept`."""
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and module_of(graph_module, node) is old:
            node.target = kept
