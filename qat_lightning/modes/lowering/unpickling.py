"""How an int8 network is read from a pickle: `torch.fx` traces the code of its forward again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import fx

_PACKAGE = __name__.partition(".")[0]


class Retracer(fx.Tracer):
    """A tracer that records calls of this package's functions, such as guards, and does not look inside."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Returns the graph of a forward that `torch.fx` has generated."""
        names = type(root).forward.__globals__
        own = {name: value for name, value in names.items() if _is_own_function(value)}
        names.update({name: partial(self._record, value) for name, value in own.items()})
        try:
            return super().trace(root, concrete_args)
        finally:
            names.update(own)

    def _record(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.create_proxy("call_function", function, args, kwargs)


def _is_own_function(value: Any) -> bool:
    module = getattr(value, "__module__", None) or ""
    return callable(value) and not isinstance(value, type) and module.partition(".")[0] == _PACKAGE
