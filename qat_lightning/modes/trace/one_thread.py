"""A tracer that records the calls of one thread only.

While torch.fx traces, it patches `nn.Module.__call__` and `nn.Module.__getattr__` for all threads. A module
that another thread calls meanwhile runs as always.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

ONE_AT_A_TIME = threading.RLock()
"""Held while a network is traced or prepared: two traces would undo each other's patches."""


@contextmanager
def replaced(owner: Any, name: str, new: Any, original: Any) -> Iterator[None]:
    """Replaces an attribute of a module or class inside the block. `new` must ask who calls it."""
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, original)


class OneThreadTracer(fx.Tracer):
    """A tracer whose patches concern only the thread that traces. Subclasses override :meth:`record_call`."""

    _thread: int | None = None

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Traces `root`."""
        with self.this_thread():
            return super().trace(root, concrete_args)

    @contextmanager
    def this_thread(self) -> Iterator[None]:
        """Records what this thread does inside the block; one thread traces at a time."""
        with ONE_AT_A_TIME:
            self._thread = threading.get_ident()
            yield

    def records(self) -> bool:
        """Whether what the calling code does is to be recorded."""
        return threading.get_ident() == self._thread

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Reads an attribute of a module; other threads read the value itself."""
        if not self.records():
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Calls `m`; a call by another thread is not recorded."""
        if not self.records():
            return forward(*args, **kwargs)
        return self.record_call(m, forward, args, kwargs)

    def record_call(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Records a call of `m` by the thread that traces."""
        return super().call_module(m, forward, args, kwargs)
