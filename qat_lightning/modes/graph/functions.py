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

FUNCTION = "function"
"""The key in the `meta` of a layer's call of the function that the layer stands for."""


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
    """Returns the names of functions, of methods of tensors, and of layers that stand for functions."""
    layers = {str(node.target) for node in graph.nodes if FUNCTION in node.meta}
    return frozenset(name for node in graph.nodes if (name := _name(node))) | layers


def keep_functions_float(
    graph_module: fx.GraphModule, scopes: dict[str, Any], keep_float: tuple[str, ...]
) -> None:
    """Replaces each call of a function in `keep_float` by a module that does the same, in place.

    Args:
        graph_module: A traced network.
        scopes: The scopes of its nodes; those of the new nodes are added.
        keep_float: Names to keep float; those that are not of functions are ignored here.
    """
    for node in list(graph_module.graph.nodes):
        if node.op != "call_module" and _name(node) in keep_float:
            name = f"{node.name}_float"
            module = ByMode.of(node, node.args, node.kwargs)
            graph_module.add_submodule(name, module)
            with graph_module.graph.inserting_before(node):
                call = graph_module.graph.call_module(name, tuple(node.all_input_nodes))
            scopes[call.name] = (name, type(module))
            node.replace_all_uses_with(call)
            graph_module.graph.erase_node(node)
    graph_module.recompile()


def layers_of_functions(graph_module: fx.GraphModule, keep_float: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names of the layers that stand for a function in `keep_float`."""
    calls = (node for node in graph_module.graph.nodes if node.op == "call_module")
    return tuple(dict.fromkeys(str(node.target) for node in calls if _name(node) in keep_float))


def _name(node: fx.Node) -> str | None:
    if node.op == "call_method":
        return f"torch.Tensor.{node.target}()"
    function = node.target if node.op == "call_function" else node.meta.get(FUNCTION)
    return function_name(function) if callable(function) else None
