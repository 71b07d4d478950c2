"""Fuses and converts modules that a graph calls several times, each call with its own int8 qparams."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import fx, nn
from torch.ao.quantization.backend_config import BackendConfig
from torch.ao.quantization.fx import fuse
from torch.nn import functional as F

from qat_lightning.modes.graph.nodes import call_target, fake_quantize_of


def fuse_evenly(
    graph_module: fx.GraphModule, backend_config: BackendConfig, alone: Collection[str] = ()
) -> fx.GraphModule:
    """Fuses the modules of a graph, each only if the same follows all its calls, and none of `alone`.

    torch.ao replaces a module by the fused one for all its calls, so that a ReLU after one call would also
    apply to the others. It fuses nothing whose result has two readers. So the calls of such a module get
    another reader meanwhile, as do the inputs of the modules named `alone`, and their results.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    for nodes in calls.values():
        if len({_reader(graph_module, node) for node in nodes}) > 1:
            _read_again(graph_module, nodes)
    for name in alone:
        _read_again(graph_module, [n for node in calls[name] for n in (node, *node.all_input_nodes)])
    fused = fuse(graph_module, is_qat=True, backend_config=backend_config)
    for node in list(fused.graph.nodes):
        if node.target is _read:
            fused.graph.erase_node(node)
    fused.recompile()
    return fused


def _reader(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """Returns what alone reads the result of `node`: a module's name, or a function; None for several."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    target = call_target(graph_module, user)
    return F.relu if target in (nn.ReLU, F.relu) else user.target


def _read_again(graph_module: fx.GraphModule, nodes: list[fx.Node]) -> None:
    """Adds a reader to the result of each node."""
    for node in nodes:
        with graph_module.graph.inserting_after(node):
            graph_module.graph.call_function(_read, (node,))


def _read(result: Any) -> None:
    """Stands for another reader of a result; never runs."""


def copy_reused_modules(prepared: fx.GraphModule) -> None:
    """Gives each further call of a module in a prepared graph a copy of the module, in place.

    An int8 layer, batch-norm or hardswish holds the scale and the zero point of its output. torch.ao makes
    only one of each module, however often it is called, with the qparams of one of the calls.
    """
    called: dict[str, int] = {}
    for node in prepared.graph.nodes:
        if node.op != "call_module" or fake_quantize_of(prepared, node) is not None:
            continue
        name = str(node.target)
        called[name] = count = called.get(name, 0) + 1
        if count > 1:
            node.target = f"{name}_call_{count}"
            prepared.add_submodule(node.target, copy.deepcopy(prepared.get_submodule(name)))
    prepared.recompile()
