"""Another `forward` for one module, without a monkeypatch: its class becomes a subclass of the user's."""

from __future__ import annotations

from typing import Any

from torch import nn


def with_forward(users: type[nn.Module], forward: Any) -> type[nn.Module]:
    """A class that differs from the user's in `forward` alone, and is called the same."""
    same = {name: getattr(users, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(users.__name__, (users,), {**same, "forward": forward})
