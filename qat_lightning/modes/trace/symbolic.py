"""Records a network without an example, where its path depends on nothing but its mode."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.base.nested import PLAIN
from qat_lightning.modes.graph.guards import check_argument
from qat_lightning.modes.purity.side_effects import refuse_side_effects
from qat_lightning.modes.purity.writes import refuse_recorded_write
from qat_lightning.modes.trace.calls import Opaque
from qat_lightning.modes.trace.contexts import watched_contexts
from qat_lightning.modes.trace.network_tracer import NetworkTracer, untraceable_error


def record_symbolically(network: nn.Module, opaque: Opaque) -> tuple[NetworkTracer, fx.Graph, fx.Graph]:
    """Records a network without an example, where its path depends on nothing but its mode."""
    tracer = _SymbolicTracer(opaque)
    with _mode(network, training=True):
        graph = _trace_once(tracer, network)
    with _mode(network, training=False):
        return tracer, graph, _trace_once(_SymbolicTracer(opaque), network)


class _SymbolicTracer(NetworkTracer):
    """Records a forward without values. It refuses what only values would show to be harmless."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Records a node, unless it writes into a tensor of the network."""
        node = super().create_node(*args, **kwargs)
        refuse_recorded_write(node)
        return node

    def record_call(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Calls `m`, unless it is a TorchScript module with weights, which would stay float unnoticed."""
        if is_scripted(m) and self.path_of_module(m) not in self.opaque.modules:
            error = TypeError("it calls a TorchScript module, which has no Python code to trace")
            self.failed = error, self.path_of_module(m)
            raise error
        return super().record_call(m, forward, args, kwargs)


@contextmanager
def _mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Puts all modules into one mode, and restores the mode of each afterwards."""
    before = {module: module.training for module in network.modules()}
    for module in before:
        module.training = training
    try:
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


def _trace_once(tracer: NetworkTracer, network: nn.Module) -> fx.Graph:
    try:
        with refuse_side_effects(network), tracer.opaque.recorded(), watched_contexts(tracer):
            graph = tracer.trace(network, concrete_args=defaults(network))
    except Exception as error:
        raise untraceable_error(network, tracer, error) from error
    names = list(inspect.signature(network.forward).parameters)
    for node, name in zip((n for n in graph.nodes if n.op == "placeholder"), names, strict=False):
        if node.target.lstrip("*").startswith(f"{name}_"):
            node.target = name  # keeps a specialized argument passable by name
            _guard(tracer, node, name)
    return graph


def _guard(tracer: NetworkTracer, argument: fx.Node, name: str) -> None:
    """Replaces torch.fx's assertion that an argument keeps its default by a guard, which says what to do."""
    graph = argument.graph
    for user in list(argument.users):
        for check in [*user.users, user]:
            graph.erase_node(check)
    with graph.inserting_after(argument):
        guard = graph.call_function(check_argument, (argument, argument.args[0], name))
    tracer.node_name_to_scope[guard.name] = ("", type(None))


def defaults(network: nn.Module) -> dict[str, Any] | None:
    """Returns the optional arguments of `forward` that may decide its path: a graph follows their defaults.

    Passing another value to the graph raises, instead of silently taking the wrong path.
    """
    parameters = inspect.signature(network.forward).parameters.values()
    return {p.name: p.default for p in parameters if type(p.default) in PLAIN} or None


def is_scripted(module: nn.Module) -> bool:
    """Whether `module` is a TorchScript module with weights, which cannot be traced."""
    return isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None
