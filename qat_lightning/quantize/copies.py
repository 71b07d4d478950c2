"""Copies modules and replaces submodules."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from qat_lightning.base.lightning_internals import forget_original
from qat_lightning.base.torch_internals import modules_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def copy_of(module: ModuleT) -> ModuleT:
    """Returns a deep copy that works as an independent LightningModule and is not compiled."""
    copied = copy.deepcopy(module, _computed_tensors(module))
    forget_original(copied)
    _detach_scripted(copied)
    return copied


def _detach_scripted(copied: nn.Module) -> None:
    """Makes the parameters of copied TorchScript modules leaves, which `deepcopy` does not."""
    for module in copied.modules():
        if isinstance(module, torch.jit.ScriptModule):
            for parameter in module.parameters(recurse=False):
                trains = parameter.requires_grad
                parameter.detach_().requires_grad_(trains)


def _computed_tensors(module: nn.Module) -> dict[int, Any]:
    """Returns copies of the tensors with a gradient history that modules hold as attributes, by id.

    `torch.nn.utils.weight_norm` stores such a weight at each forward, and `deepcopy` refuses it.
    """
    return {
        id(value): value.detach().clone()
        for child in module.modules()
        for value in vars(child).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }


def replace_submodule(module: ModuleT, name: str, new: nn.Module) -> ModuleT:
    """Replaces the submodule `name` by `new`, wherever it is registered.

    Returns:
        `module`, or `new` if the name is empty.
    """
    if not name:
        return new  # type: ignore[return-value]
    old = module.get_submodule(name)
    for parent in list(module.modules()):
        for key, child in modules_of(parent).items():
            if child is old:
                setattr(parent, key, new)
    return module
