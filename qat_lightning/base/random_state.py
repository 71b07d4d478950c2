"""Captures and restores the states of all random generators of a process, as plain values for checkpoints."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """Returns the states of the generators of Python, NumPy, PyTorch and CUDA, as plain values."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def same_state(left: Any, right: Any) -> bool:
    """Returns whether two random states are equal."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return np.array_equal(left, right)
    if isinstance(left, dict):
        return all(same_state(value, right[key]) for key, value in left.items())
    if isinstance(left, list | tuple):
        return all(same_state(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def restore(state: dict[str, Any]) -> None:
    """Restores every generator to a state that :func:`capture` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    cuda = state.get("cuda", ())
    if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([generator.cpu() for generator in cuda])


@contextmanager
def preserved() -> Iterator[None]:
    """Restores every generator at the end of the `with` block."""
    state = capture()
    try:
        yield
    finally:
        restore(state)
