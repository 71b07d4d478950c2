"""Constructors with some of their arguments, which a QConfig holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


class Constructor:
    """A class with some of its arguments; calling it makes a module.

    It has the interface of the constructors in `torch.ao`'s QConfigs.

    Attributes:
        p: The class and the arguments.
        callable_args: Functions that return further arguments, by name; they run when the module is made.
    """

    def __init__(self, p: partial[Any], callable_args: dict[str, Callable[[], Any]] | None = None) -> None:
        self.p = p
        self.callable_args = callable_args or {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        late = {name: value() for name, value in self.callable_args.items() if name not in kwargs}
        return self.p(*args, **kwargs, **late)

    def __repr__(self) -> str:
        return f"{self.p!r}{self.callable_args!r}"

    def with_args(self, **kwargs: Any) -> Constructor:
        """Returns a constructor with further arguments."""
        return Constructor(partial(self, **kwargs))

    def with_callable_args(self, **kwargs: Callable[[], Any]) -> Constructor:
        """Returns a constructor with further arguments, which functions return."""
        return Constructor(self.p, {**self.callable_args, **kwargs})


class Constructible:
    """A class whose constructors can be made with some of their arguments."""

    @classmethod
    def with_args(cls, **kwargs: Any) -> Constructor:
        """Returns a constructor with these arguments."""
        return Constructor(partial(cls, **kwargs))

    @classmethod
    def with_callable_args(cls, **kwargs: Callable[[], Any]) -> Constructor:
        """Returns a constructor with arguments that functions return when it is called."""
        return Constructor(partial(cls), kwargs)
