"""Describes one network for a report: its layers, what was fused and what stays float."""

from __future__ import annotations

import torch
from torch import nn

from qat_lightning.analysis.preflight import inventory
from qat_lightning.analysis.preflight.call_location import call_lines
from qat_lightning.base.inputs import Inputs
from qat_lightning.quantize.recipe import recipe_of
from qat_lightning.report.content import Network
from qat_lightning.report.layers import measure_layers


def describe(name: str, prepared: nn.Module, int8: nn.Module, inputs: Inputs) -> Network:
    """Runs a network in float, with fake-quantization and in int8, and describes it.

    Args:
        name: Its name in the LightningModule.
        prepared: A copy of the prepared network, in eval mode on the CPU, with fake-quantization on.
        int8: The network after conversion.
        inputs: The inputs to run it on.
    """
    recipe = recipe_of(prepared)
    assert recipe is not None
    with torch.no_grad(), call_lines(prepared) as lines:
        prepared(*inputs.args, **inputs.kwargs)
    work = inventory.count_work(prepared, inputs)
    quantized, floats = inventory.layers(prepared, int8, recipe, work, lines)
    batch_norms = inventory.batch_norms(int8, lines)
    operations = inventory.float_ops(int8)
    return Network(
        name=name,
        recipe={"backend": recipe.backend, "mode": recipe.mode, "qconfig": recipe.qconfig},
        fused=inventory.fused_layers(prepared),
        floats=tuple(map(str, [*floats, *batch_norms, *operations])),
        int8_share=sum(work.layers.get(layer, 0) for layer in quantized) / max(work.total, 1),
        layers=tuple(measure_layers(prepared, int8, inputs)),
    )
