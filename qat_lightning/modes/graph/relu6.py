"""Replaces ReLU6 by ReLU, which int8 fuses into the layer before it; a clamp at 6 is an extra operation.

The range of a fake-quantize ends where the data ends, so that the upper clamp is not needed, and training
adapts. The names of the parameters stay, so that float checkpoints still load. The clamp of a hard sigmoid,
`relu6(x + 3) / 6`, is part of a function and stays.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.base.torch_internals import modules_of
from qat_lightning.modes.graph.functions import node_function

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")


def is_relu6_module(module: nn.Module) -> bool:
    """Whether `module` clamps to 0…6: a ReLU6, or a Hardtanh with these limits."""
    return isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == (0, 6)


def clamped_to_six(function: Any, args: Any, kwargs: Any) -> Any:
    """Returns the input of a call that clamps to 0…6; None for any other call."""
    if function not in (F.relu6, F.hardtanh, F.hardtanh_):
        return None
    bound = inspect.signature(function).bind(*args, **kwargs).arguments
    clamps = function is F.relu6 or (bound.get("min_val"), bound.get("max_val")) == (0, 6)
    return bound["input"] if clamps else None


def is_inside(name: str, roots: tuple[str, ...]) -> bool:
    """Whether the module `name` is one of `roots`, or inside one of them."""
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def replace_relu6_modules(network: nn.Module, kept: tuple[str, ...] = ()) -> int:
    """Replaces the ReLU6 modules in `network`, except in the modules `kept`, and returns how many."""
    count = 0
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if name and not is_inside(name, kept) and is_relu6_module(module):
            parent, _, leaf = name.rpartition(".")
            relu = nn.ReLU(inplace=bool(module.inplace)).train(module.training)
            modules_of(network.get_submodule(parent))[leaf] = relu
            count += 1
    return count


def replace_relu6_in_graph(graph_module: fx.GraphModule, scopes: Any, kept: tuple[str, ...]) -> int:
    """Replaces ReLU6 modules and calls, in place, except in `kept`, and returns how many."""
    nodes = [node for node in graph_module.graph.nodes if node_function(node) not in kept]
    calls = [node for node in nodes if node.op == "call_module"]
    shifted = [str(node.target) for node in calls if any(map(_is_shifted, node.all_input_nodes))]
    count = replace_relu6_modules(graph_module, (*kept, *shifted))
    for node in nodes:
        x = clamped_to_six(node.target, node.args, node.kwargs)
        if x is not None and not _is_shifted(x) and not is_inside(scopes[node.name][0], kept):
            node.target, node.args, node.kwargs = F.relu, (x,), {}
            count += 1
    graph_module.recompile()
    return count


def _is_shifted(x: fx.Node) -> bool:
    """Whether a value in a graph is a tensor plus a number, as `x + 3` in a hard sigmoid."""
    return x.target in _SUMS and sum(isinstance(operand, fx.Node) for operand in x.args) == 1
