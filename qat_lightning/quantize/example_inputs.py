"""Finds example inputs for a network by running its LightningModule on `example_input_array`."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

from qat_lightning.base import random_state
from qat_lightning.base.torch_internals import tree_map
from qat_lightning.quantize.copies import copy_of


def example_inputs_of(module: nn.Module, name: str) -> tuple[Any, ...] | None:
    """Runs `module` on its `example_input_array`, and returns what it passes to the submodule `name`.

    Returns:
        The positional arguments of the first call. None if `module` has no `example_input_array`, does not
        call the submodule, or passes keyword-only arguments.

    Raises:
        ValueError: `module` does not run on its `example_input_array`.
    """
    example = getattr(module, "example_input_array", None)
    if example is None:
        return None
    parameter = next(module.parameters(), torch.empty(0))
    caught: list[tuple[Any, ...]] = []

    def catch(child: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(child.forward).bind(*args, **kwargs)
        if not bound.kwargs:
            caught.append(copy.deepcopy(bound.args))

    twin = copy_of(module).eval()
    twin.get_submodule(name).register_forward_pre_hook(catch, with_kwargs=True)
    example = tree_map(
        lambda v: v.to(parameter.device, copy=True) if isinstance(v, torch.Tensor) else v, example
    )
    try:
        with torch.no_grad(), random_state.preserved():
            _call(twin, example)
    except Exception as error:
        raise ValueError(
            f"To find what to fuse, a copy of {type(module).__name__} runs on its example_input_array, and "
            f"that failed: {error} ({type(error).__name__}). Correct it, or list the fusions, as in "
            "fuse=[['conv1', 'bn1', 'relu1'], …]."
        ) from error
    return caught[0] if caught else None


def _call(module: nn.Module, example: Any) -> None:
    """Calls `module` like Lightning: a tuple holds positional arguments, a dict keyword arguments."""
    if isinstance(example, dict):
        module(**example)
    elif isinstance(example, tuple):
        module(*example)
    else:
        module(example)
