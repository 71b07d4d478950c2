"""A trace records operations on tensors and nothing else: what else a forward does happens once, for ever.

A random number drawn in Python, or a counter that a forward advances, would be frozen at the value that the
trace met. Both are found by comparing before and after, and refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from qat_lightning import random_state

_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def records_nothing_else(network: nn.Module) -> Iterator[None]:
    """Raises a `ValueError` if the block draws random numbers or changes the modules; both are undone."""
    random_before, plain_before = random_state.capture(), _plain(network)
    buffers = {module: dict(module._buffers) for module in network.modules()}
    try:
        yield
    finally:
        random_after, plain_after = random_state.capture(), _plain(network)
        random_state.restore(random_before)
        assigned = _undo(plain_before, plain_after, buffers)
    if assigned:
        raise ValueError(f"its forward assigns to {assigned!r}, and a graph would not")
    if not _equal(random_before, random_after):
        raise ValueError("its forward draws random numbers while it is traced, and a graph would repeat them")


def _plain(network: nn.Module) -> dict[tuple[nn.Module, str], Any]:
    return {
        (module, name): value
        for module in network.modules()
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and name != "training"
    }


def _undo(before: Any, after: Any, buffers: dict[nn.Module, dict[str, Any]]) -> str | None:
    """Puts attributes and buffers back, and names one that was changed."""
    changed = None
    for (module, name), value in before.items():
        if after.get((module, name), value) != value or isinstance(vars(module).get(name), fx.Proxy):
            setattr(module, name, value)
            changed = name
    for module, kept in buffers.items():
        for name, value in kept.items():
            if module._buffers.get(name) is not value or isinstance(vars(module).get(name), fx.Proxy):
                vars(module).pop(name, None)
                module._buffers[name] = value
                changed = name
    return changed


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return all(_equal(value, right[key]) for key, value in left.items())
    if isinstance(left, list | tuple):
        return all(_equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)
