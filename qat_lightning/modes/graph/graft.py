"""Grafts a graph onto a module: the module stays the same object, and its `forward` runs the graph.

A LightningModule is more than its `forward`: the Trainer holds the object and calls its other methods. So the
prepared layers replace the originals under the same names, and the module's class becomes a subclass of the
user's whose `forward` is the code of the graph. The module keeps the graph as a plain attribute, not as a
submodule: the graph calls the module's own children.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from qat_lightning.base.subclass import forward_of, with_forward
from qat_lightning.base.torch_internals import buffers_of, modules_of, parameters_of
from qat_lightning.modes.graph.behaviour import LostForward, mark_containers

_ATTRIBUTE = "_qat_graft"
_MARK = "_qat_runs_a_graph"  # an attribute of the classes that `graft` makes
_FIX = "Call the whole module instead."


@dataclass
class _Graft:
    """The data from which a grafted module becomes a graph module again.

    Attributes:
        graph: The graph.
        meta: The graph module's `meta`, which torch.ao needs to convert.
        added: Names of the modules, parameters and buffers that the user's class does not have.
    """

    graph: fx.Graph
    meta: dict[str, Any]
    added: list[str]


def must_stay_in_place(network: nn.Module) -> bool:
    """Whether `network` must stay the same object: a LightningModule, recognized by its `training_step`."""
    return hasattr(network, "training_step")


def is_grafted(module: nn.Module) -> bool:
    """Whether `module` runs a graph over its own children."""
    return _ATTRIBUTE in vars(module)


def calls(module: nn.Module, name: str) -> bool:
    """Whether the graph of a grafted module uses the submodule `name`, or anything inside it."""
    graft = vars(module).get(_ATTRIBUTE)
    return graft is not None and _uses(targets(graft.graph), name)


def graphs(module: nn.Module) -> Iterator[tuple[nn.Module, fx.Graph]]:
    """Yields each module that runs a graph, and the graph: `module` itself or modules inside it."""
    for child in module.modules():
        if is_grafted(child):
            yield child, vars(child)[_ATTRIBUTE].graph
        elif isinstance(child, fx.GraphModule):
            yield child, child.graph


def targets(graph: fx.Graph) -> set[str]:
    """Returns the names of the modules, parameters and buffers that a graph uses."""
    return {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}


def graft(module: nn.Module, graph_module: fx.GraphModule, used: set[str]) -> None:
    """Makes `module` run the graph of `graph_module` over its own children, in place.

    Args:
        module: The module that the graph was traced from.
        graph_module: The prepared or int8 network.
        used: Names that the graph used before it was prepared or converted. Modules among them that it no
            longer has get a stand-in.
    """
    mark_containers(graph_module, type(module).__name__, _FIX)
    forward: Any = type(graph_module).forward
    graph_module.graph.owning_module = None
    _replace(module, graph_module, used)
    added = _add(module, graph_module)
    vars(module)[_ATTRIBUTE] = _Graft(graph_module.graph, dict(graph_module.meta), added)
    vars(module).pop("forward", None)  # Lightning's DDP leaves one that is bound to the old class
    module.__class__ = _subclass(module, forward)


def ungraft(module: nn.Module) -> fx.GraphModule:
    """Makes a graph module from the graph of a grafted `module`; the two share all submodules."""
    state: _Graft = vars(module)[_ATTRIBUTE]
    graph_module = fx.GraphModule(module, copy.deepcopy(state.graph), type(module).__name__)
    graph_module.meta.update(state.meta)
    return graph_module


def regraft(module: nn.Module, graph_module: fx.GraphModule) -> None:
    """Replaces the graph of a grafted `module` by one that was made from it, in place."""
    state: _Graft = vars(module)[_ATTRIBUTE]
    kept = targets(graph_module.graph)
    used = targets(state.graph) - set(state.added)
    new = modules_of(graph_module)
    for name in state.added:
        if name not in kept or new.get(name) is not modules_of(module).get(name):
            delattr(module, name)
    graft(module, graph_module, used)
    again: list[str] = vars(module)[_ATTRIBUTE].added
    again += [name for name in state.added if name in kept and name not in again]


def _subclass(module: nn.Module, forward: Any) -> type[nn.Module]:
    user_class = type(module).__bases__[0] if _MARK in vars(type(module)) else type(module)
    grafted = with_forward(user_class, forward)
    setattr(grafted, _MARK, True)
    return grafted


def _replace(module: nn.Module, graph_module: fx.GraphModule, used: set[str]) -> None:
    """Replaces each original module by the prepared one, wherever the original is registered."""
    prepared = dict(graph_module.named_modules())
    new: dict[nn.Module, nn.Module] = {}
    for name, old in module.named_modules():
        # A ModuleList or ModuleDict stays: it has no forward to lose, and the user's code indexes it.
        if name and _uses(used, name) and forward_of(old) is not nn.Module.forward:
            lost = name not in prepared
            new[old] = LostForward(type(module).__name__, name, _FIX) if lost else prepared[name]
    for old, replacement in new.items():
        if isinstance(replacement, LostForward):
            for key, child in old.named_children():
                if key not in modules_of(replacement):
                    replacement.add_module(key, new.get(child, child))
    for parent in list(module.modules()):
        for key, registered in modules_of(parent).items():
            if registered in new:
                modules_of(parent)[key] = new[registered]


def _uses(used: set[str], name: str) -> bool:
    """Whether one of the names in `used` is `name`, or lies inside it."""
    return any(f"{path}.".startswith(f"{name}.") for path in used)


def _add(module: nn.Module, graph_module: fx.GraphModule) -> list[str]:
    """Gives `module` what the graph uses and `module` does not have yet; returns the names."""
    added = []
    kinds: list[Callable[[nn.Module], Mapping[str, Any]]] = [modules_of, parameters_of, buffers_of]
    for kind in kinds:
        for name, value in kind(graph_module).items():
            if name not in kind(module):
                vars(module).pop(name, None)  # a constant of the module, which the graph has as a buffer
                setattr(module, name, nn.Buffer(value) if kind is buffers_of else value)
                added.append(name)
    return added
