"""Weights that are no layer's own, and weights of a layer that something else reads, too.

`F.linear(x, self.weight)` becomes a call of a torch.nn layer that shares the parameter. torch.ao fuses
nothing into a function, and keeps its int8 weight in an object that no file can hold. `F.linear(x,
self.weight[:8])` becomes a layer that reads these rows of the parameter.

A reader of a layer's weight or bias, such as a penalty, gets the parameter under a name of the graph's own. A
fused layer has its parameters elsewhere, and an int8 layer has none.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.base.torch_internals import BatchNorm
from qat_lightning.modes.graph.functions import FUNCTION
from qat_lightning.modes.graph.nodes import called_modules
from qat_lightning.modes.graph.quantizable import QUANTIZABLE
from qat_lightning.modes.trace.functional import (
    ALL_ROWS,
    DIMENSIONS,
    attribute,
    reads_rows,
    rows_of,
    stay_float,
)
from qat_lightning.modes.trace.own_layers import LAYER_OF, layer_with, linear_with_rows


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
        known = node.op == "call_function" and node.target in LAYER_OF
        if not known or not (_is_stored(node.args[1]) or reads_rows(node)):
            continue
        layer = _layer(graph_module, node)
        if layer is None:
            stay_float(node)
            continue
        parameters, settings = node.args[1:3], node.args[3:]
        key = node.target, *map(_source, parameters), *settings
        if key not in layers:
            layers[key] = _name(graph_module, node, scopes[node.name][0])
            graph_module.add_submodule(layers[key], layer)
        node.meta[FUNCTION] = node.target
        node.op, node.target, node.args = "call_module", layers[key], node.args[:1]
        _erase_reads(graph_module, parameters, called)
    graph_module.recompile()


def _source(value: Any) -> Any:
    """Returns the name of the parameter whose rows `value` is, and the rows; None for no parameter."""
    found = rows_of(value)
    return None if found is None else (found[0].target, found[1])


def _erase_reads(graph_module: fx.GraphModule, parameters: Any, called: AbstractSet[str]) -> None:
    """Erases what nothing reads any more, except the reads to which parameters owe their keys."""
    found = [(value, rows_of(value)) for value in parameters if value is not None]
    for value, source in found:
        if value.op != "get_attr" and not value.users:
            graph_module.graph.erase_node(value)
        read = source[0] if source else value
        if not read.users and _called_owner(graph_module, read, called) is not None:
            graph_module.graph.erase_node(read)


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
    given: Any = [value for value in node.args[1:3] if value is not None]
    computed = set(node.all_input_nodes) - {node.args[0], *given}
    sources = [found for value in given if (found := rows_of(value)) is not None]
    if computed or len(sources) < len(given):
        return None
    function: Any = node.target
    weight, bias = [*(attribute(graph_module, str(read.target)) for read, _ in sources), None][:2]
    if not weight.is_floating_point() or weight.ndim != 2 + DIMENSIONS[function]:
        return None
    parameters = _parameter(weight), None if bias is None else _parameter(bias)
    rows = [rows for _, rows in sources]
    if any(each != ALL_ROWS for each in rows):
        return linear_with_rows(*parameters, [*rows, ALL_ROWS][:2])
    return layer_with(LAYER_OF[function], *parameters, *node.args[3:])


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def _name(graph_module: fx.GraphModule, node: fx.Node, scope: str) -> str:
    """Returns a name for a new layer, in the module that calls the function, after its weight."""
    source: Any = rows_of(node.args[1])
    function: Any = node.target
    path = str(source[0].target).removeprefix(f"{scope}.").replace(".", "_")
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
