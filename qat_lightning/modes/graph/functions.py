"""Names the functions that a graph calls, and keeps all calls of a function float.

torch.ao keeps a module float, and out of every fusion, if it does not know the class of the module. So each
call that is to stay float becomes such a module.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from qat_lightning.modes.graph.by_mode import ByMode


def function_name(function: Callable[..., Any]) -> str:
    """Returns the name for recipes: `"operator.add()"`, `"torch.matmul()"`, `"torch.Tensor.view()"`."""
    name = getattr(function, "__name__", type(function).__name__)
    for namespace in (operator, torch, F):
        if getattr(namespace, name, None) is function:
            return f"{namespace.__name__}.{name}()"
    if hasattr(function, "__objclass__"):  # a method of tensors, looked up on the class
        return f"torch.Tensor.{name}()"
    return f"{function.__module__}.{name}()"


def called_functions(graph: fx.Graph) -> frozenset[str]:
    """Returns the names of the functions, and of the methods of tensors, that a graph calls."""
    return frozenset(name for node in graph.nodes if (name := _name(node)))


def keep_functions_float(
    graph_module: fx.GraphModule, scopes: dict[str, Any], keep_float: tuple[str, ...], *, own_weights: bool
) -> None:
    """Replaces each call of a function in `keep_float` by a module that does the same, in place.

    Args:
        graph_module: A traced network.
        scopes: The scopes of its nodes; those of the new nodes are added.
        keep_float: Names to keep float; those that are not of functions are ignored here.
        own_weights: Whether to keep `F.linear` and convolutions float, too, if their weight is a parameter of
            the network. torch.ao keeps the int8 weight of such a call in a plain attribute, which only a
            graph module would save.
    """
    for node in list(graph_module.graph.nodes):
        if _name(node) in keep_float or (own_weights and _has_own_weight(node)):
            name = f"{node.name}_float"
            module = ByMode.of(node, node.args, node.kwargs)
            graph_module.add_submodule(name, module)
            with graph_module.graph.inserting_before(node):
                call = graph_module.graph.call_module(name, tuple(node.all_input_nodes))
            scopes[call.name] = (name, type(module))
            node.replace_all_uses_with(call)
            graph_module.graph.erase_node(node)
    graph_module.recompile()


def _has_own_weight(node: fx.Node) -> bool:
    weights: Any = [*node.args[1:2], node.kwargs.get("weight")]
    named = any(isinstance(w, fx.Node) and w.op == "get_attr" for w in weights)
    return named and node.target in (F.linear, F.conv1d, F.conv2d, F.conv3d)


def _name(node: fx.Node) -> str | None:
    if node.op == "call_method":
        return f"torch.Tensor.{node.target}()"
    return function_name(node.target) if node.op == "call_function" and callable(node.target) else None
