"""The `forward` of a class, and subclasses with another one, which change a single module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def forward_of(module: nn.Module) -> Any:
    """Returns the `forward` of the class of `module`; None for a TorchScript module, whose class has none."""
    return None if isinstance(module, torch.jit.ScriptModule) else type(module).forward


def with_forward(user_class: type[nn.Module], forward: Any) -> type[nn.Module]:
    """Returns a subclass of the user's class with the same name and another `forward`."""
    same = {name: getattr(user_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(user_class.__name__, (user_class,), {**same, "forward": forward})
