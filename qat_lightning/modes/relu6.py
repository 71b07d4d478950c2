"""ReLU6 becomes ReLU: int8 fuses a ReLU into the layer before it, and a clamp at 6 costs an op of its own.

The range of a fake-quantize ends where the data ends, so the upper clamp has nothing left to do:
training adapts, and parameter names stay, so float checkpoints still load.
"""

from __future__ import annotations

import inspect

import torch
from torch import fx, nn
from torch.nn import functional as F


def is_relu6_module(module: nn.Module) -> bool:
    """Whether `module` clamps to 0…6."""
    return isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == (0, 6)


def is_relu6(node: fx.Node) -> bool:
    """Whether a call in a graph clamps to 0…6."""
    if node.op != "call_function" or node.target not in (F.relu6, F.hardtanh, F.hardtanh_):
        return False
    if node.target is F.relu6:
        return True
    bound = inspect.signature(F.hardtanh).bind(*node.args, **node.kwargs).arguments
    return (bound.get("min_val"), bound.get("max_val")) == (0, 6)


def is_inside(name: str, roots: tuple[str, ...]) -> bool:
    """Whether a module is one of `roots`, or in one of them."""
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def replace_relu6_modules(network: nn.Module, keep_float: tuple[str, ...] = ()) -> list[str]:
    """Replaces every ReLU6 module in `network`, in place, and returns their names."""
    replaced = []
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if name and not is_inside(name, keep_float) and is_relu6_module(module):
            parent, _, leaf = name.rpartition(".")
            relu = nn.ReLU(inplace=bool(module.inplace)).train(module.training)
            network.get_submodule(parent)._modules[leaf] = relu
            replaced.append(name)
    return replaced


def name_relus_alike(graph_module: fx.GraphModule) -> None:
    """Makes `torch.relu(x)` and `x.relu()` of a graph `F.relu(x)`, in place, which alone torch.ao fuses."""
    for node in graph_module.graph.nodes:
        is_function = node.op == "call_function" and node.target in (torch.relu, torch.relu_)
        if is_function or (node.op == "call_method" and node.target in ("relu", "relu_")):
            in_place = node.target in (torch.relu_, "relu_")
            node.op, node.target, node.kwargs = "call_function", F.relu, {"inplace": in_place}
    graph_module.recompile()
