"""The example that an export is traced with and checked against: a network, inputs and outputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat_lightning.base import cpu
from qat_lightning.base.errors import ConversionError
from qat_lightning.base.sqnr import sqnr
from qat_lightning.base.torch_internals import tree_map_only
from qat_lightning.export.runtime import Runtime, RuntimeNetwork
from qat_lightning.export.structure import STRUCTURE_KEY, structure_of, tensors_of
from qat_lightning.fake_quant.ranges import check_observed
from qat_lightning.quantize.recipe import quantized_networks

RECIPE_KEY = "qat_lightning.quantize.recipe"


@dataclass(frozen=True)
class Example:
    """One forward pass of a prepared network, in eval mode on the CPU.

    Attributes:
        module: A copy of the network, or of the LightningModule that holds it.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        outputs: What it returned.
        metadata: What a file is to say of itself: the recipes, and the structure of the outputs.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    metadata: dict[str, str]

    def check(self, runtime: Runtime, path: Path, min_sqnr: float) -> None:
        """Raises a `ConversionError` if the outputs of `runtime`, which loaded the future `path`, differ.

        That is, below `min_sqnr`, and not within a step of the grid that the fake-quant outputs lie on.
        """
        found = RuntimeNetwork(runtime)(*self.args, **self.kwargs)
        for index, (want, got) in enumerate(zip(tensors_of(self.outputs), tensors_of(found), strict=True)):
            agreement = sqnr(want, got)
            if agreement < min_sqnr and not _within_a_step(want, got):
                raise ConversionError(
                    f"In {runtime.name}, output {index} of {path} agrees with the fake-quant output to "
                    f"{agreement:.1f} dB only, below {min_sqnr:.0f} dB: it does not compute what was "
                    "trained. No file was written. Pass example_inputs like the batches of the training, "
                    f"or a lower min_sqnr if the network is not trained.{_hint()}"
                )


def _hint() -> str:
    """Returns a hint if this CPU may be the cause."""
    if not cpu.overflows():
        return ""
    return (
        " This CPU has no VNNI: sums overflow where activations have 8 bits (backend='onednn'), or where "
        "those of 7 bits lie far beyond their range, as when observers froze before it had settled."
    )


def _within_a_step(want: torch.Tensor, got: torch.Tensor) -> bool:
    """Whether int8 outputs differ by less than a step on average, which rounding explains.

    After a few steps of training a network's outputs span a few steps of their grid, and have few decibels.
    Outputs that are on no grid have no step to speak of.
    """
    steps = want.unique().diff()
    return bool(steps.numel() and (want - got).abs().mean() <= steps.min())


def example_of(prepared: nn.Module, example_inputs: Any) -> Example:
    """Runs a copy of `prepared` on example inputs.

    Args:
        prepared: A network that `prepare` made, or a module that holds some.
        example_inputs: A tuple or list of arguments, a dict of them by name, or None for the module's
            `example_input_array`. They may lie on any device.

    Raises:
        ValueError: There are no example inputs, or nothing prepared in the module.
        ConversionError: No data passed through the network.
    """
    recipes = {name: recipe for name, _, recipe in quantized_networks(prepared) if not recipe.int8}
    if not recipes:
        raise ValueError(
            "An export takes a network that `prepare` made, before `convert`, but received "
            f"{type(prepared).__name__}, which holds none."
        )
    for name in recipes:
        check_observed(prepared.get_submodule(name))
    arguments = _arguments(prepared, example_inputs)
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), arguments)
    module = copy.deepcopy(prepared).cpu().eval()
    with torch.no_grad():
        outputs = module(*args, **kwargs)
    metadata = {f"{RECIPE_KEY}.{name}".rstrip("."): recipe.to_json() for name, recipe in recipes.items()}
    return Example(module, args, kwargs, outputs, metadata | {STRUCTURE_KEY: structure_of(outputs)})


def _arguments(prepared: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_inputs is None:
        example_inputs = getattr(prepared, "example_input_array", None)
    if example_inputs is None:
        raise ValueError(
            "An export needs example inputs, but none were given and the module has no "
            "example_input_array. Pass example_inputs=(batch,)."
        )
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs), {}
