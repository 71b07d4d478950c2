"""Inserts the fake-quantizes of a plan into a graph."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn

from qat_lightning.fake_quant.fake_quantize import FakeQuantize
from qat_lightning.fake_quant.fixed import fixed_fake_quantize
from qat_lightning.modes.passes.annotate import Plan, Rounding

_NAME = "activation_post_process_"
AFTER_FLOAT = "rounds_float_results"
"""Key in a graph module's `meta`: the names of the nodes that round what a float operation made."""
MOVING = "moves_rounded_values"
"""Key in a graph module's `meta`: the names of the nodes that return values of a rounded tensor."""


def insert(graph_module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Returns the graph with a fake-quantize for each rounding; those that share their qparams share one."""
    made = _modules(plan)
    rounded: dict[fx.Node, fx.Node] = {}
    after_float: set[str] = set()
    graph_module.meta |= {AFTER_FLOAT: after_float, MOVING: {node.name for node in plan.moving}}
    for i, rounding in enumerate(plan.roundings):
        name = f"{_NAME}{i}"
        graph_module.add_submodule(name, made[id(rounding)])
        source = rounded.get(rounding.node, rounding.node)
        call = _call(graph_module.graph, name, source)
        if rounding.averaged and isinstance(made[id(rounding)], FakeQuantize):
            call.kwargs = {"averaged": True}
        readers = [user for user in source.users if user is not call]
        for reader in readers if rounding.readers is None else rounding.readers:
            reader.replace_input_with(source, call)
        if rounding.readers is None:
            rounded[rounding.node] = call
        else:
            after_float.add(call.name)
    for fake_quantize, calls in Counter(made.values()).items():
        if isinstance(fake_quantize, FakeQuantize):
            fake_quantize.forward_extremes.calls = calls
    prepared = fx.GraphModule(graph_module, graph_module.graph, type(graph_module).__name__)
    prepared.meta.update(graph_module.meta)
    return prepared


def _call(graph: fx.Graph, name: str, source: fx.Node) -> fx.Node:
    """Adds the call of a fake-quantize after what it reads, and after all inputs of the graph."""
    place = source
    while place.next.op == "placeholder":
        place = place.next
    with graph.inserting_after(place):
        return graph.call_module(name, (source,))


def _modules(plan: Plan) -> dict[int, nn.Module]:
    """Makes the fake-quantize of each rounding."""
    leaders = {id(rounding): rounding for rounding in plan.roundings}

    def leader(rounding: Rounding) -> Rounding:
        while leaders[id(rounding)] is not rounding:
            rounding = leaders[id(rounding)]
        return rounding

    for one, other in plan.shared:
        first, second = leader(one), leader(other)
        leaders[id(second)] = first
    made: dict[int, nn.Module] = {}
    for rounding in plan.roundings:
        first = leader(rounding)
        if id(first) not in made:
            made[id(first)] = _fake_quantize(first)
        made[id(rounding)] = made[id(first)]
    return made


def _fake_quantize(rounding: Rounding) -> nn.Module:
    if rounding.fixed is not None:
        constructor = fixed_fake_quantize(*rounding.fixed)
    else:
        constructor = rounding.qconfig.weight if rounding.weight else rounding.qconfig.activation
    made: nn.Module = constructor()
    return made
