"""Finds an example of the call of each network, from which its graph is captured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qat_lightning.base import random_state
from qat_lightning.base.inputs import Catcher, Inputs, device_of
from qat_lightning.base.nested import map_tensors
from qat_lightning.quantize.copies import copy_of


def as_inputs(example_inputs: Any) -> Inputs:
    """Returns what a user passes as `example_inputs` as the arguments of a call.

    Args:
        example_inputs: A tuple of positional arguments, a mapping of keyword arguments, or the only argument,
            such as a tensor.
    """
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, Mapping):
        return Inputs((), {str(name): value for name, value in example_inputs.items()})
    return Inputs(example_inputs if isinstance(example_inputs, tuple) else (example_inputs,), {})


class Examples:
    """An example of the call of each network in a module.

    Args:
        module: The module. If a network's example is asked for that is not `known`, a copy of the module runs
            on its `example_input_array`.
        known: Examples by the networks' names. None stands for a network that is traced symbolically.
        names: The names of the networks.
    """

    def __init__(
        self, module: nn.Module, known: Mapping[str, Inputs | None] | None, names: Sequence[str]
    ) -> None:
        self._module, self._names, self._known = module, names, dict(known or {})
        self._array = getattr(module, "example_input_array", None)

    def of(self, name: str) -> Inputs | None:
        """Returns the example of the network `name`; None if there is none.

        Raises:
            ValueError: The module does not run on its `example_input_array`.
        """
        if name not in self._known and self._array is not None:
            self._known = {**dict.fromkeys(self._names), **self._run(), **self._known}
        return self._known.get(name)

    def _run(self) -> dict[str, Inputs]:
        twin = copy_of(self._module).eval()
        device = device_of(twin)
        inputs = as_inputs(map_tensors(self._array, lambda tensor: tensor.to(device, copy=True)))
        networks = {name: twin.get_submodule(name) for name in self._names}
        try:
            with torch.no_grad(), random_state.preserved(), Catcher(networks.values()) as catcher:
                twin(*inputs.args, **inputs.kwargs)
        except Exception as error:
            raise ValueError(
                f"To see how its networks are called, a copy of {type(self._module).__name__} runs on its "
                f"example_input_array, and that failed: {error} ({type(error).__name__}). Correct it; in "
                "eager mode you can also list the fusions, as in fuse=[['conv1', 'bn1', 'relu1'], …]."
            ) from error
        return catcher.named(networks)
