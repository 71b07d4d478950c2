"""Copies modules and replaces submodules."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from qat_lightning.base.lightning_internals import forget_original
from qat_lightning.base.torch_internals import modules_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def copy_of(module: ModuleT) -> ModuleT:
    """Returns a deep copy that works as an independent LightningModule and is not compiled."""
    copied = copy.deepcopy(module)
    forget_original(copied)
    return copied


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
