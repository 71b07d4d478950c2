"""Finds the fake-quantize that produced each layer's input, in a graph of the prepared network."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.base import random_state
from qat_lightning.fake_quant.fake_quantize import FakeQuantize
from qat_lightning.fake_quant.numerics import rectify
from qat_lightning.fake_quant.switches import is_fake_quantize
from qat_lightning.modes.graph.flow import is_leaf
from qat_lightning.modes.graph.nodes import call_target, module_of
from qat_lightning.modes.layers.integer_arithmetic import IntegerArithmetic, set_input_fake_quantize
from qat_lightning.modes.layers.moves import JOINS, MORE_JOINS, MORE_MOVES, MOVES, may_move_values
from qat_lightning.modes.trace.one_thread import OneThreadTracer
from qat_lightning.modes.trace.symbolic import defaults

_KEEPS_QPARAMS = MOVES | MORE_MOVES | {rectify, F.pad}
_HARD_SWISHES: frozenset[Any] = frozenset({nn.Hardswish, F.hardswish})
HARD_SWISH_LIMIT = 3.0
"""A hard-swish is linear beyond ±3. If the qparams represent 3, its curve is a product of integers."""


def connect_inputs(network: nn.Module, graph: fx.Graph) -> None:
    """Tells each layer of a prepared `network` which fake-quantize produced its input, in place.

    A layer is told nothing if its calls read from different fake-quantizes, or if one is unknown. The input
    of a hard-swish gets qparams that represent 3 exactly.

    Args:
        network: The network.
        graph: A graph that calls the modules of `network` by their names.
    """
    sources: dict[str, set[nn.Module | None]] = {}
    for node in graph.nodes:
        if isinstance(module_of(network, node), IntegerArithmetic):
            sources.setdefault(str(node.target), set()).add(_source(network, node.args[0]))
        elif call_target(network, node) in _HARD_SWISHES and isinstance(
            source := _source(network, node.args[0]), FakeQuantize
        ):
            source.exact_value = HARD_SWISH_LIMIT
    for name, found in sources.items():
        fake_quantize = found.pop()
        if not found and isinstance(fake_quantize, FakeQuantize) and fake_quantize.axis is None:
            set_input_fake_quantize(network.get_submodule(name), fake_quantize)


def connect_inputs_by_trace(network: nn.Module) -> None:
    """Does the same for an eager network, with a trace of a copy in eval mode, if it can be traced."""
    twin = copy.deepcopy(network).eval()
    with suppress(Exception), random_state.preserved():  # a forward may raise anything when it gets proxies
        connect_inputs(network, _Tracer().trace(twin, concrete_args=defaults(twin)))


def _source(network: nn.Module, node: Any) -> nn.Module | None:
    """Returns the fake-quantize that produced the values of `node`; None if it is unknown."""
    while isinstance(node, fx.Node):
        module = module_of(network, node)
        if is_fake_quantize(module):
            return module
        for owner in (module, getattr(module, "requantize", None)):  # eager mode calls both from hooks
            hooked = getattr(owner, "activation_post_process", None)
            if is_fake_quantize(hooked):
                return hooked
        target = call_target(network, node)
        if target in JOINS | MORE_JOINS and isinstance(node.args[0], list | tuple):
            sources = {_source(network, each) for each in node.args[0]}
            return sources.pop() if len(sources) == 1 else None
        if target not in _KEEPS_QPARAMS or not may_move_values(module, node):
            return None
        node = node.args[0]
    return None


class _Tracer(OneThreadTracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, IntegerArithmetic) or is_fake_quantize(m)
        return known or is_leaf(m, module_qualified_name, ())
