"""Shows weights to fake-quantizes that have not seen them: those of a network that has never run."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qat_lightning.modes.graph.constants import Constants
from qat_lightning.modes.graph.nodes import fake_quantize_of


def observe_weights(prepared: fx.GraphModule) -> None:
    """Gives each per-channel fake-quantize in a graph its channels, from the weight that it rounds."""
    constants = Constants(prepared)
    for node in prepared.graph.nodes:
        fake_quantize: Any = fake_quantize_of(prepared, node)
        if fake_quantize is not None:
            observe(fake_quantize, lambda node=node: constants.of(node.all_input_nodes[0]))


def observe(fake_quantize: Any, weight: Any) -> None:
    """Gives one its channels, from what `weight()` returns."""
    if getattr(fake_quantize, "is_per_channel", False) and fake_quantize.scale.numel() == 1:
        value: torch.Tensor = weight()
        fake_quantize(value.detach())
