"""Refuses forwards with side effects, which a trace cannot record.

A trace records only operations on tensors. A random number that the forward draws in Python, or a counter
that it advances, would be frozen at the value it had in the trace. Both are found by comparing states before
and after.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.base import random_state
from qat_lightning.base.torch_internals import buffers_of

_PLAIN = (bool, int, float, str, type(None))


class Impure(ValueError):
    """The error for a forward with a side effect, which a graph would not repeat.

    Attributes:
        module: The module that the forward changed; None if that is not known.
    """

    def __init__(self, message: str, module: nn.Module | None = None) -> None:
        super().__init__(message)
        self.module = module


@contextmanager
def refuse_side_effects(network: nn.Module) -> Iterator[None]:
    """Raises :class:`Impure` if the block draws random numbers or changes the modules, and undoes both."""
    random_before, plain_before = random_state.capture(), _plain(network)
    buffers = {module: dict(buffers_of(module)) for module in network.modules()}
    try:
        yield
    finally:
        random_after, plain_after = random_state.capture(), _plain(network)
        random_state.restore(random_before)
        assigned = _undo(plain_before, plain_after, buffers)
    if assigned:
        raise Impure(f"its forward assigns to {assigned[1]!r}, and a graph would not", assigned[0])
    if not same_state(random_before, random_after):
        raise Impure("its forward draws random numbers while it is traced, and a graph would repeat them")


def _plain(network: nn.Module) -> dict[tuple[nn.Module, str], Any]:
    return {
        (module, name): value
        for module in network.modules()
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and name != "training"
    }


def _undo(before: Any, after: Any, buffers: dict[nn.Module, dict[str, Any]]) -> tuple[nn.Module, str] | None:
    """Restores attributes and buffers; returns the module and the name of one that had changed, if any."""
    changed = None
    for (module, name), value in before.items():
        if after.get((module, name), value) != value or isinstance(vars(module).get(name), fx.Proxy):
            setattr(module, name, value)
            changed = module, name
    for module, kept in buffers.items():
        for name, value in kept.items():
            if buffers_of(module).get(name) is not value or isinstance(vars(module).get(name), fx.Proxy):
                vars(module).pop(name, None)
                buffers_of(module)[name] = value
                changed = module, name
    return changed


def same_state(left: Any, right: Any) -> bool:
    """Whether two random states are equal."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return all(same_state(value, right[key]) for key, value in left.items())
    if isinstance(left, list | tuple):
        return all(same_state(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)
