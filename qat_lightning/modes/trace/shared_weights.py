"""Weights that are no layer's own, and weights of a layer that something else reads, too.

`F.linear(x, self.weight)` becomes a call of a torch.nn layer that shares the parameter. torch.ao fuses
nothing into a function, and keeps its int8 weight in an object that no file can hold.

A reader of a layer's weight or bias, such as a penalty, gets the parameter under a name of the graph's own. A
fused layer has its parameters elsewhere, and an int8 layer has none.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.base.torch_internals import BatchNorm
from qat_lightning.modes.graph.functions import FUNCTION
from qat_lightning.modes.graph.nodes import called_modules
from qat_lightning.modes.graph.quantizable import QUANTIZABLE
from qat_lightning.modes.trace.functional import attribute, stay_float
from qat_lightning.modes.trace.own_layers import LAYER_OF, layer_with

_DIMENSIONS: dict[Any, int] = {F.linear: 0, F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


def call_layers_of_weights(graph_module: fx.GraphModule, scopes: dict[str, Any]) -> None:
    """Replaces each function call with a stored weight by a call of a new layer, in place.

    The graph still reads the parameter, and ignores it, so that it keeps its key in the state dict.
    Conversion removes what a graph ignores.

    Args:
        graph_module: A traced network, with all arguments of these calls written out.
        scopes: The scopes of its nodes. A layer belongs to the module that calls the function.
    """
    called = called_modules(graph_module).keys()
    layers: dict[Any, str] = {}
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target not in LAYER_OF or not _is_stored(node.args[1]):
            continue
        _, weight, bias, *settings = node.args
        layer = _layer(graph_module, node)
        if layer is None:
            stay_float(node)
            continue
        key = node.target, weight.target, bias and bias.target, *settings
        if key not in layers:
            layers[key] = _name(graph_module, node, scopes[node.name][0])
            graph_module.add_submodule(layers[key], layer)
        node.meta[FUNCTION] = node.target
        node.op, node.target, node.args = "call_module", layers[key], node.args[:1]
        for read in (weight, bias):
            if read is not None and not read.users and _called_owner(graph_module, read, called) is not None:
                graph_module.graph.erase_node(read)
    graph_module.recompile()


def copy_reads_of_layers(graph_module: fx.GraphModule) -> None:
    """Gives what reads a parameter of a called layer or norm the parameter under another name, in place."""
    called, owners = called_modules(graph_module).keys(), (*QUANTIZABLE, BatchNorm)
    names: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and isinstance(_called_owner(graph_module, node, called), owners):
            if node.target not in names:
                names[node.target] = _free(graph_module, "", node.target.replace(".", "_"))
                setattr(graph_module, names[node.target], attribute(graph_module, node.target))
            node.target = names[node.target]
    graph_module.recompile()


def _is_stored(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _layer(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Returns a layer that computes what `node` does, with the same parameters; None if there is none."""
    reads: Any = [read for read in node.args[1:3] if read is not None]
    computed = set(node.all_input_nodes) - {node.args[0], *reads}
    if computed or not all(map(_is_stored, reads)):
        return None
    function: Any = node.target
    weight, bias = [*(attribute(graph_module, read.target) for read in reads), None][:2]
    if not weight.is_floating_point() or weight.ndim != 2 + _DIMENSIONS[function]:
        return None
    parameters = _parameter(weight), None if bias is None else _parameter(bias)
    return layer_with(LAYER_OF[function], *parameters, *node.args[3:])


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def _name(graph_module: fx.GraphModule, node: fx.Node, scope: str) -> str:
    """Returns a name for a new layer, in the module that calls the function, after its weight."""
    weight: Any = node.args[1]
    function: Any = node.target
    path = str(weight.target).removeprefix(f"{scope}.").replace(".", "_")
    return _free(graph_module, f"{scope}." if scope else "", f"{path}_{function.__name__}")


def _free(graph_module: fx.GraphModule, prefix: str, name: str) -> str:
    """Returns `prefix` and `name`, with a number if the graph module has that name already."""
    taken = {n for n, _ in graph_module.named_modules(remove_duplicate=False)}
    taken |= {n for n, _ in graph_module.named_parameters(remove_duplicate=False)}
    taken |= {n for n, _ in graph_module.named_buffers(remove_duplicate=False)}
    numbered = (f"{prefix}{name}_{i}" for i in range(2, len(taken) + 3))
    return next(each for each in (prefix + name, *numbered) if each not in taken)


def _called_owner(graph_module: fx.GraphModule, read: fx.Node, called: AbstractSet[str]) -> nn.Module | None:
    """Returns the module that holds what `read` reads, if that or one around it is among those `called`."""
    owner = str(read.target).rpartition(".")[0]
    parts = owner.split(".")
    paths = {".".join(parts[: i + 1]) for i in range(len(parts))}
    return graph_module.get_submodule(owner) if owner and paths & called else None
