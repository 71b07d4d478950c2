"""Looks up what a node of a graph calls: a module, a function, a method or a fake-quantize."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.fake_quant.switches import is_fake_quantize

RELUS: frozenset[Any] = frozenset({nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"})
"""What a node may call to compute a ReLU."""
SPLITS: frozenset[Any] = frozenset({torch.chunk, torch.split, torch.unbind, "chunk", "split", "unbind"})
"""What returns several parts of a tensor."""


def module_of(network: nn.Module, node: fx.Node) -> Any:
    """Returns the module that `node` calls; None if it calls something else."""
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def sole_reader(node: fx.Node) -> fx.Node | None:
    """Returns the only reader of a node's result; None if there are others, or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def called_modules(graph_module: fx.GraphModule) -> dict[str, nn.Module]:
    """Returns the modules that a graph calls, by the names that it calls them by, in its order."""
    names = dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module")
    return {name: graph_module.get_submodule(name) for name in names}


def call_target(network: nn.Module, node: fx.Node) -> Any:
    """Returns the type of the module, the function, or the name of the method that `node` calls."""
    return node.target if node.op != "call_module" else type(module_of(network, node))


def fake_quantize_of(network: nn.Module, node: fx.Node) -> Any:
    """Returns the fake-quantize that `node` calls; None if it calls something else."""
    module = module_of(network, node)
    return module if is_fake_quantize(module) else None
