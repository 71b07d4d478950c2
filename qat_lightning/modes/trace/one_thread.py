"""A tracer that records the calls of one thread only.

While torch.fx traces, it patches `nn.Module.__call__` and `nn.Module.__getattr__` for all threads. A module
that another thread calls meanwhile runs as always.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import fx, nn

ONE_AT_A_TIME = threading.RLock()
"""Held while a network is traced or prepared: two traces would undo each other's patches."""


class OneThreadTracer(fx.Tracer):
    """A tracer whose patches concern only the thread that traces. Subclasses override :meth:`record_call`."""

    _thread: int | None = None

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Traces `root`; one thread traces at a time."""
        with ONE_AT_A_TIME:
            self._thread = threading.get_ident()
            return super().trace(root, concrete_args)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Reads an attribute of a module; other threads read the value itself."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Calls `m`; a call by another thread is not recorded."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return self.record_call(m, forward, args, kwargs)

    def record_call(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Records a call of `m` by the thread that traces."""
        return super().call_module(m, forward, args, kwargs)
