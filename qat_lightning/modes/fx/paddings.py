"""Paddings of torch.ao's kind: they share the qparams of their input, and run on its integers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx
from torch.ao.quantization.backend_config import BackendPatternConfig, DTypeConfig, ObservationType

from qat_lightning.modes.graph.pads import pad_values

# torch.ao lowers only operations that it knows by name. This one shares the qparams of its input, too.
_STAND_IN = "contiguous"


def padding_config() -> BackendPatternConfig:
    """Returns how torch.ao prepares a padding."""
    int8 = DTypeConfig(input_dtype=torch.quint8, output_dtype=torch.quint8)
    return (
        BackendPatternConfig(pad_values)
        .set_observation_type(ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT)
        .add_dtype_config(int8)
    )


def lower_paddings(
    prepared: fx.GraphModule, convert: Callable[[fx.GraphModule], fx.GraphModule]
) -> fx.GraphModule:
    """Converts a prepared graph, in which a stand-in takes the place of each padding meanwhile."""
    for node in prepared.graph.nodes:
        if node.target is pad_values:
            node.op, node.target = "call_method", _STAND_IN
    int8 = convert(prepared)
    for node in int8.graph.nodes:
        if node.op == "call_method" and node.target == _STAND_IN and len(node.args) > 1:
            node.op, node.target = "call_function", pad_values
    int8.recompile()
    return int8
