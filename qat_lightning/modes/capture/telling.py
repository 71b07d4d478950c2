"""Makes modules tell a tracer of their calls, and of the parameters and buffers that are read from them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from qat_lightning.base.subclass import other_classes


def telling_modules(root: nn.Module, tracer: Any) -> AbstractContextManager[None]:
    """Gives the modules in `root` classes, inside the block, that tell `tracer`."""
    kinds = {m: type(m) for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)}
    telling = {kind: _telling(kind, tracer) for kind in dict.fromkeys(kinds.values())}
    return other_classes({module: telling[kind] for module, kind in kinds.items()})


def _telling(kind: type[nn.Module], tracer: Any) -> type[nn.Module]:
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if tracer.computing:
            return kind.__call__(module, *args, **kwargs)
        return tracer.call_module(module, lambda *a, **k: kind.__call__(module, *a, **k), args, kwargs)

    def read(module: nn.Module, name: str) -> Any:
        value = kind.__getattr__(module, name)
        return value if tracer.computing else tracer.read(value)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {"__call__": call, "__getattr__": read, **names})
