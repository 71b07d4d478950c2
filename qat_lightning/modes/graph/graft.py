"""A module that stays itself: the same object, of the user's class, whose `forward` runs a graph.

A LightningModule is more than its `forward`: the Trainer holds it, and calls its other methods. Its prepared
layers are put back onto it under their names, and its class becomes a subclass of the user's whose `forward`
is the code of the graph. The graph itself is kept unregistered: what it calls are the module's own children.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from qat_lightning.modes.graph.behaviour import LostForward, mark_containers
from qat_lightning.modes.graph.subclass import with_forward

_ATTRIBUTE = "_qat_graft"
_MARK = "_qat_runs_a_graph"  # of the classes that `graft` makes
_FIX = "Call the whole module instead."


@dataclass
class _Graft:
    """What a grafted module keeps to become a graph module again.

    Attributes:
        graph: The graph.
        meta: The graph module's `meta`, from which torch.ao converts.
        added: Names of the modules, parameters and buffers that the user's class does not have.
    """

    graph: fx.Graph
    meta: dict[str, Any]
    added: list[str]


def must_stay_in_place(network: nn.Module) -> bool:
    """Whether `network` has to remain the object that it is: a LightningModule, told by its steps."""
    return hasattr(network, "training_step")


def is_grafted(module: nn.Module) -> bool:
    """Whether `module` runs a graph over its own children."""
    return _ATTRIBUTE in vars(module)


def calls(module: nn.Module, name: str) -> bool:
    """Whether the graph of a grafted module uses its submodule `name`, or something in it."""
    graft = vars(module).get(_ATTRIBUTE)
    return graft is not None and _uses(targets(graft.graph), name)


def graphs(module: nn.Module) -> Iterator[tuple[nn.Module, fx.Graph]]:
    """Yields each module in `module`, or itself, that runs a graph, with the graph."""
    for child in module.modules():
        if is_grafted(child):
            yield child, vars(child)[_ATTRIBUTE].graph
        elif isinstance(child, fx.GraphModule):
            yield child, child.graph


def targets(graph: fx.Graph) -> set[str]:
    """Names of the modules, parameters and buffers that a graph uses."""
    return {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}


def graft(module: nn.Module, graph_module: fx.GraphModule, used: set[str]) -> None:
    """Makes `module` run the graph of `graph_module` over its own children, in place.

    Args:
        module: The module that the graph was traced from.
        graph_module: The prepared or int8 network.
        used: What the graph used before it was prepared or converted. What is gone gets a stand-in.
    """
    mark_containers(graph_module, type(module).__name__, _FIX)
    forward: Any = type(graph_module).forward
    graph_module.graph.owning_module = None
    _replace(module, graph_module, used)
    added = _add(module, graph_module)
    vars(module)[_ATTRIBUTE] = _Graft(graph_module.graph, dict(graph_module.meta), added)
    vars(module).pop("forward", None)  # DDP in Lightning leaves one, bound to the class before
    module.__class__ = _subclass(module, forward)


def ungraft(module: nn.Module) -> fx.GraphModule:
    """A graph module of the graph of a grafted `module`, which shares all modules with it."""
    state: _Graft = vars(module)[_ATTRIBUTE]
    graph_module = fx.GraphModule(module, copy.deepcopy(state.graph), type(module).__name__)
    graph_module.meta.update(state.meta)
    return graph_module


def regraft(module: nn.Module, graph_module: fx.GraphModule) -> None:
    """Gives a grafted `module` the graph that was made of its own, in place."""
    state: _Graft = vars(module)[_ATTRIBUTE]
    kept = targets(graph_module.graph)
    used = targets(state.graph) - set(state.added)
    for name in state.added:
        if name not in kept:
            delattr(module, name)
    graft(module, graph_module, used)
    vars(module)[_ATTRIBUTE].added += [name for name in state.added if name in kept]


def _subclass(module: nn.Module, forward: Any) -> type[nn.Module]:
    users = type(module).__bases__[0] if _MARK in vars(type(module)) else type(module)
    grafted = with_forward(users, forward)
    setattr(grafted, _MARK, True)
    return grafted


def _replace(module: nn.Module, graph_module: fx.GraphModule, used: set[str]) -> None:
    """Puts what was prepared in the place of what it was made from, wherever that is registered."""
    prepared = dict(graph_module.named_modules())
    new: dict[nn.Module, nn.Module] = {}
    for name, old in module.named_modules():
        # A ModuleList or ModuleDict has no forward that could be lost, and is indexed.
        if name and _uses(used, name) and type(old).forward is not nn.Module.forward:
            lost = name not in prepared
            new[old] = LostForward(type(module).__name__, name, _FIX) if lost else prepared[name]
    for old, replacement in new.items():
        if isinstance(replacement, LostForward):
            for key, child in old.named_children():
                if key not in replacement._modules:
                    replacement.add_module(key, new.get(child, child))
    for parent in list(module.modules()):
        for key, registered in parent._modules.items():
            if registered in new:
                parent._modules[key] = new[registered]


def _uses(used: set[str], name: str) -> bool:
    """Whether a graph that uses those names uses `name`, or something in it."""
    return any(f"{path}.".startswith(f"{name}.") for path in used)


def _add(module: nn.Module, graph_module: fx.GraphModule) -> list[str]:
    """Gives `module` what the graph uses and the user's class does not have; returns the names."""
    added = []
    for kind in ("_modules", "_parameters", "_buffers"):
        for name, value in vars(graph_module)[kind].items():
            if name not in vars(module)[kind]:
                vars(module).pop(name, None)  # a constant, which in a graph is a buffer
                setattr(module, name, nn.Buffer(value) if kind == "_buffers" else value)
                added.append(name)
    return added
