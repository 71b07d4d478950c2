"""The example that an export is traced and checked with: a network, its inputs and its outputs."""

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
from qat_lightning.export.fields import as_fields
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
        outputs: What it returned, with `Fields` in the place of dataclasses.
        metadata: Metadata for the file: the recipes, and the structure of the outputs.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    metadata: dict[str, str]

    def check(self, runtime: Runtime, path: Path, min_sqnr: float) -> None:
        """Compares the outputs of a runtime with the fake-quant outputs.

        Args:
            runtime: The exported file, loaded.
            path: Where the file will be written; the error names it.
            min_sqnr: Least agreement, in dB. Outputs also pass if they differ by less than one quantization
                step on average.

        Raises:
            ConversionError: An output agrees less.
        """
        found = RuntimeNetwork(runtime)(*self.args, **self.kwargs)
        for index, (want, got) in enumerate(zip(tensors_of(self.outputs), tensors_of(found), strict=True)):
            agreement = sqnr(want, got)
            if agreement < min_sqnr and not _within_a_step(want, got):
                raise ConversionError(
                    f"In {runtime.name}, output {index} of {path} agrees with the fake-quant output to "
                    f"{agreement:.1f} dB only, below {min_sqnr:.0f} dB: it does not compute what was "
                    "trained. No file was written. Pass example_inputs that resemble the training batches, "
                    f"or a lower min_sqnr if the network is not trained.{_overflow_hint()}"
                )


def _overflow_hint() -> str:
    """Returns a hint if an overflow on this CPU may be the cause, else an empty text."""
    if not cpu.overflows():
        return ""
    return (
        " This CPU has no VNNI: sums overflow if activations have 8 bits (backend='onednn'), or if 7-bit "
        "activations lie far beyond their range, for example because observers froze too early."
    )


def _within_a_step(want: torch.Tensor, got: torch.Tensor) -> bool:
    """Returns whether int8 outputs differ by less than one quantization step on average.

    Rounding explains such a difference. The outputs of a barely trained network span only a few quantization
    steps, so their SQNR is low even then. Outputs that are not quantized have no such step, and do not pass.
    """
    steps = want.unique().diff()
    return bool(steps.numel() and (want - got).abs().mean() <= steps.min())


def example_of(prepared: nn.Module, example_inputs: Any) -> Example:
    """Runs a copy of `prepared` on example inputs.

    Args:
        prepared: A network that `prepare` made, or a module that holds such networks.
        example_inputs: A tuple or list of arguments, a dict of arguments by name, or None for the module's
            `example_input_array`. They may be on any device.

    Raises:
        ValueError: There are no example inputs, or the module holds no prepared network.
        ConversionError: The network has not seen any data.
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
        outputs = as_fields(module(*args, **kwargs))
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
