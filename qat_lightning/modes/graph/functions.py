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
    return frozenset(name for node in graph.nodes if (name := node_function(node))) | layers


def node_function(node: fx.Node) -> str | None:
    """Returns the name of the function or method that a node calls, or whose layer it calls; else None."""
    if node.op == "call_method":
        return f"torch.Tensor.{node.target}()"
    function = node.target if node.op == "call_function" else node.meta.get(FUNCTION)
    return function_name(function) if callable(function) else None
