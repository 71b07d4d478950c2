"""Looks up what a node of a graph calls: a module, a function, a method or a fake-quantize."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.ao.quantization import FakeQuantizeBase
from torch.ao.quantization.backend_config import ObservationType, get_native_backend_config
from torch.nn import functional as F

from qat_lightning.modes.functions.pads import pad_values


def _operations(observation: ObservationType) -> frozenset[Any]:
    configs = get_native_backend_config().configs
    return frozenset(config.pattern for config in configs if config.observation_type is observation)


SHARES_INPUT_QPARAMS = _operations(ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT) | {pad_values}
"""Operations, such as a reshape, whose output has the qparams of its input: types, functions and methods."""
READS_NO_VALUES = _operations(ObservationType.INPUT_OUTPUT_NOT_OBSERVED)
"""Operations that read the shape of a tensor, or the like."""


RELUS: frozenset[Any] = frozenset({nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"})
"""What a node may call to compute a ReLU."""


def module_of(network: nn.Module, node: fx.Node) -> Any:
    """Returns the module that `node` calls; None if it calls something else."""
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def called_modules(graph_module: fx.GraphModule) -> dict[str, nn.Module]:
    """Returns the modules that a graph calls, by the names that it calls them by, in its order."""
    names = dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module")
    return {name: graph_module.get_submodule(name) for name in names}


def call_target(network: nn.Module, node: fx.Node) -> Any:
    """Returns the type of the module, the function, or the name of the method that `node` calls."""
    return node.target if node.op != "call_module" else type(module_of(network, node))


def fake_quantize_of(network: nn.Module, node: fx.Node) -> FakeQuantizeBase | None:
    """Returns the fake-quantize that `node` calls; None if it calls something else."""
    module = module_of(network, node)
    return module if isinstance(module, FakeQuantizeBase) else None
