"""Classes of modules: their `forward`, subclasses with another one for a single module, and their origin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def forward_of(module: nn.Module) -> Any:
    """Returns the `forward` of the class of `module`; None for a TorchScript module, whose class has none."""
    return None if isinstance(module, torch.jit.ScriptModule) else type(module).forward


@contextmanager
def other_classes(classes: Mapping[nn.Module, type[nn.Module]]) -> Iterator[None]:
    """Gives modules other classes inside the block. Only these objects change: others see no difference."""
    before = {module: type(module) for module in classes}
    try:
        for module, kind in classes.items():
            module.__class__ = kind
        yield
    finally:
        for module, kind in before.items():
            module.__class__ = kind


def with_forward(user_class: type[nn.Module], forward: Any) -> type[nn.Module]:
    """Returns a subclass of the user's class with the same name and another `forward`."""
    same = {name: getattr(user_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(user_class.__name__, (user_class,), {**same, "forward": forward})


def derives_from(value: object, package: str, *names: str) -> bool:
    """Whether the class of `value`, or a base of it, is one of these in a package, which is not imported.

    Args:
        value: Any object.
        package: How the names of the package's modules begin, as in `"torch.ao."`.
        *names: Names of classes; none for any class.
    """
    kinds = [kind for kind in type(value).__mro__ if kind.__module__.startswith(package)]
    return any(not names or kind.__name__ in names for kind in kinds)
