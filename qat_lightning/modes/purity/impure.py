"""The error for a forward with a side effect."""

from __future__ import annotations

from torch import nn


class Impure(ValueError):
    """The error for a forward with a side effect, which a graph would not repeat.

    Attributes:
        module: The module that the forward changed; None if that is not known.
    """

    def __init__(self, message: str, module: nn.Module | None = None) -> None:
        super().__init__(message)
        self.module = module
