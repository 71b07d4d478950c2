"""Copies of modules, and new networks put in the place of old ones."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def copy_of(module: ModuleT) -> ModuleT:
    """A deep copy that also works as a LightningModule of its own; not compiled, where `module` is."""
    copied = copy.deepcopy(module)
    if hasattr(copied, "_metric_attributes"):
        # Lightning's memory of its metrics, by the ids of the original's.
        vars(copied)["_metric_attributes"] = None
    for name in vars(copied).get("_compiler_ctx") or ():
        # Lightning's compiled methods, which would run the original.
        vars(copied).pop(name.removeprefix("original_"), None)
        vars(copied)["_compiler_ctx"] = None
    return copied


def replace_submodule(module: ModuleT, name: str, new: nn.Module) -> ModuleT:
    """Puts `new` in the place of the submodule `name`, and wherever else the same one is registered.

    Returns:
        `module`, or `new` where the name is empty.
    """
    if not name:
        return new  # type: ignore[return-value]
    old = module.get_submodule(name)
    for parent in list(module.modules()):
        for key, child in parent._modules.items():
            if child is old:
                setattr(parent, key, new)
    return module
