"""On which grid that lies which each layer reads, found in a graph of the prepared network."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn
from torch.ao.quantization import FakeQuantizeBase
from torch.nn import functional as F

from qat_lightning.base import random_state
from qat_lightning.fake_quant.fake_quantize import FakeQuantize
from qat_lightning.fake_quant.numerics import rectify
from qat_lightning.modes.graph.flow import is_leaf
from qat_lightning.modes.graph.nodes import call_target, module_of
from qat_lightning.modes.layers.integer_arithmetic import IntegerArithmetic, set_input_fake_quantize
from qat_lightning.modes.trace.tracing import defaults

# What returns numbers that its first argument holds, or 0: they lie on the same grid.
_KEEPS: frozenset[Any] = frozenset(
    {
        *(nn.Identity, nn.Flatten, nn.Unflatten, nn.ReLU, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.PixelShuffle, nn.ChannelShuffle),
        *(torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze),
        *(torch.relu, F.relu, F.max_pool1d, F.max_pool2d, F.max_pool3d, rectify),
        *("flatten", "reshape", "view", "transpose", "permute", "squeeze", "unsqueeze", "contiguous", "relu"),
    }
)
_HARD_SWISHES: frozenset[Any] = frozenset({nn.Hardswish, F.hardswish})
HARD_SWISH_LIMIT = 3.0
"""Beyond which a hard-swish is linear. On a grid that holds it the curve between is a product of integers."""


def connect_inputs(network: nn.Module, graph: fx.Graph) -> None:
    """Tells each layer of a prepared `network` the fake-quantize behind its input, in place.

    One that reads different grids in different places, or a grid that is not known, is told nothing. What a
    hard-swish reads gets a grid that its curve fits.

    Args:
        network: The network.
        graph: One that calls its modules by their names.
    """
    grids: dict[str, set[FakeQuantizeBase | None]] = {}
    for node in graph.nodes:
        if isinstance(module_of(network, node), IntegerArithmetic):
            grids.setdefault(str(node.target), set()).add(_behind(network, node.args[0]))
        elif call_target(network, node) in _HARD_SWISHES and isinstance(
            read := _behind(network, node.args[0]), FakeQuantize
        ):
            read.exact_value = HARD_SWISH_LIMIT
    for name, behind in grids.items():
        grid = behind.pop()
        if not behind and isinstance(grid, FakeQuantize) and grid.axis is None:
            set_input_fake_quantize(network.get_submodule(name), grid)


def connect_inputs_by_trace(network: nn.Module) -> None:
    """The same for an eager network, from a trace of a copy in eval mode, where it can be traced."""
    twin = copy.deepcopy(network).eval()
    with suppress(Exception), random_state.preserved():  # whatever a forward raises that gets no tensors
        connect_inputs(network, _Tracer().trace(twin, concrete_args=defaults(twin)))


def _behind(network: nn.Module, node: Any) -> FakeQuantizeBase | None:
    """The fake-quantize that made the numbers that `node` returns."""
    while isinstance(node, fx.Node):
        module = module_of(network, node)
        if isinstance(module, FakeQuantizeBase):
            return module
        for owner in (module, getattr(module, "requantize", None)):  # which hooks call in eager mode
            hooked = getattr(owner, "activation_post_process", None)
            if isinstance(hooked, FakeQuantizeBase):
                return hooked
        if call_target(network, node) not in _KEEPS:
            return None
        node = node.args[0]
    return None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, IntegerArithmetic | FakeQuantizeBase) or is_leaf(m, module_qualified_name, ())
