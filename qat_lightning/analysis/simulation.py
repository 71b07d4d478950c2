"""Simulates int8 without training: a prepared copy with ranges calibrated on a few batches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qat_lightning.analysis.batches import Batches, collect_inputs, inputs_of
from qat_lightning.analysis.example_batch import prepare_on_batch
from qat_lightning.base.inputs import Inputs
from qat_lightning.fake_quant.fake_quantize import FakeQuantize, fake_quantizes
from qat_lightning.fake_quant.phases import average_over, only_observe, set_enabled, set_eval
from qat_lightning.fake_quant.ranges import has_range, has_seen_data, is_moving_average
from qat_lightning.quantize.copies import copy_of
from qat_lightning.quantize.options import Settings
from qat_lightning.quantize.prepare import prepare
from qat_lightning.quantize.recipe import quantized_networks


@dataclass(frozen=True)
class Simulation:
    """A module in eval mode that simulates int8 with any subset of its fake-quantizes on.

    Attributes:
        module: The prepared copy.
        networks: The prepared networks in it that were called, by name.
        inputs: The inputs of each call, by the network's name.
    """

    module: nn.Module
    networks: Mapping[str, nn.Module]
    inputs: Mapping[str, Sequence[Inputs]]

    @property
    def fake_quants(self) -> frozenset[Any]:
        """Returns all fake-quantizes."""
        return frozenset(fake_quant for _, fake_quant in fake_quantizes(self.module))

    def round_with(self, fake_quants: Collection[Any]) -> None:
        """Switches these fake-quantizes on, and all others off."""
        for fake_quant in self.fake_quants:
            fake_quant.enable_fake_quant(fake_quant in fake_quants)


def simulate(
    module: nn.Module,
    settings: Settings,
    batches: Batches,
    inputs: Mapping[str, Sequence[Inputs]] | None = None,
) -> Simulation:
    """Prepares a copy of `module` if it is float, and calibrates it if its ranges saw no data.

    Args:
        module: A float or prepared LightningModule or network. It does not change.
        settings: How to prepare a float module.
        batches: The batches to calibrate on.
        inputs: The inputs that an earlier simulation collected from these batches, to reuse.

    Raises:
        ValueError: The module is int8, cannot be prepared, or calls none of its networks.
    """
    copied = _prepared(copy_of(module), settings, batches)
    networks = {name: network for name, network, _ in quantized_networks(copied)}
    set_eval(copied)
    if inputs is None:
        set_enabled(copied, observer=False, fake_quant=False)
        inputs = collect_inputs(copied, networks, batches)
    networks = {name: networks[name] for name in inputs}
    for name, network in networks.items():
        calibrate(network, inputs[name])
    set_enabled(copied, observer=False, fake_quant=True)
    return Simulation(copied, networks, inputs)


@torch.no_grad()
def calibrate(network: nn.Module, calls: Sequence[Inputs]) -> None:
    """Calibrates the fake-quantizes of a prepared network in eval mode, in place, unless all saw data.

    Ranges that are moving averages in training become the mean over all calls. Batch-norm statistics do not
    change.
    """
    fake_quants = [fake_quant for _, fake_quant in fake_quantizes(network)]
    if all(has_seen_data(fake_quant) for fake_quant in fake_quants if has_range(fake_quant)):
        return
    seen: Counter[nn.Module] = Counter()

    def average(fake_quant: Any, args: Any) -> None:
        seen[fake_quant] += 1
        if isinstance(fake_quant, FakeQuantize):
            fake_quant.average_over(math.ceil(seen[fake_quant] / fake_quant.forward_extremes.calls))
        else:
            fake_quant.activation_post_process.averaging_constant = 1 / seen[fake_quant]

    averaged = [f for f in fake_quants if has_range(f) and is_moving_average(f)]
    handles = [fake_quant.register_forward_pre_hook(average) for fake_quant in averaged]
    only_observe(network)
    for call in calls:
        network(*call.args, **call.kwargs)
    for handle in handles:
        handle.remove()
    average_over(network, None)
    set_eval(network)


def _prepared(module: nn.Module, settings: Settings, batches: Batches) -> nn.Module:
    recipes = [recipe for _, _, recipe in quantized_networks(module)]
    if any(recipe.int8 for recipe in recipes):
        raise ValueError(
            f"{type(module).__name__} holds an int8 network, in which rounding cannot be switched off. Pass "
            "the float module, or the prepared one."
        )
    if recipes:
        return module
    if hasattr(module, "training_step") or settings.modules is not None:
        first = {"validation_step": lambda: next(iter(batches), None)}
        prepare_on_batch(module, settings, first)
        return module
    example = next((inputs_of(module, batch) for batch in batches), None)
    return prepare(module, example_inputs=example, **settings.options)
