"""Functions and modules that a trace cannot look into: each becomes a single call in the graph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, FunctionType
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate

from qat_lightning.modes.graph.functions import function_name


@dataclass(frozen=True)
class Opaque:
    """The modules and functions that a trace does not look into.

    Attributes:
        modules: Names of modules.
        functions: Functions, such as one that computes with sizes, each with the namespace and the name by
            which it is called.
    """

    modules: frozenset[str] = frozenset()
    functions: tuple[tuple[dict[str, Any], str, FunctionType], ...] = ()

    @classmethod
    def named(cls, names: Collection[str], network: nn.Module) -> Opaque:
        """Returns the modules and functions with these names; a function's name ends in `()`.

        A function is found wherever a module of Python has it. Those of PyTorch are single calls anyway.
        """
        modules = frozenset(name for name, _ in network.named_modules() if name in names)
        if len(modules) == len(names):
            return cls(modules)
        spaces = [getattr(each, "__dict__", {}) for each in list(sys.modules.values())]
        functions = [
            (space, name, value)
            for space in spaces
            for name, value in list(space.items())
            if type(value) is FunctionType and not _is_ours(value) and function_name(value) in names
        ]
        return cls(modules, tuple(functions))

    def __or__(self, other: Opaque) -> Opaque:
        return Opaque(self.modules | other.modules, self.functions + other.functions)

    def with_culprit(
        self, error: BaseException | None, network: nn.Module, splittable: Callable[[nn.Module], bool]
    ) -> Opaque | None:
        """Adds the innermost function, or module that is not `splittable`, that could not be traced.

        Returns None if there is neither, or if it is among these already.
        """
        names = {module: name for name, module in network.named_modules()}
        frames = _frames(error)
        for caller, frame in zip(reversed(frames[:-1]), reversed(frames[1:]), strict=True):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                name = names.get(module, "")
                if not name or splittable(module) or name in self.modules:
                    return None
                return self | Opaque(frozenset({name}))
            called = frame.f_code.co_name
            function = caller.f_globals.get(called)
            if isinstance(function, FunctionType) and function.__code__ is frame.f_code:
                if _is_ours(function) or any(f is function for *_, f in self.functions):
                    continue
                return self | Opaque(functions=((caller.f_globals, called, function),))
        return None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Makes a trace inside the block record calls of these functions, if an argument is a proxy."""
        for namespace, name, function in self.functions:
            namespace[name] = _recording(function)
        try:
            yield
        finally:
            for namespace, name, function in self.functions:
                namespace[name] = function


def _is_ours(function: FunctionType) -> bool:
    return (function.__module__ or "").split(".")[0] in ("torch", "qat_lightning")


def _frames(error: BaseException | None) -> list[FrameType]:
    """Returns the frames of an error's traceback, the outermost first."""
    frames, traceback = [], error.__traceback__ if error else None
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return frames


def _recording(function: FunctionType) -> Callable[..., Any]:
    """Wraps a function so that a call with a proxy becomes a node instead of running the function."""

    def call(*args: Any, **kwargs: Any) -> Any:
        proxies: list[fx.Proxy] = []
        map_aggregate((args, kwargs), lambda a: proxies.append(a) if isinstance(a, fx.Proxy) else None)
        if not proxies:
            return function(*args, **kwargs)
        return proxies[0].tracer.create_proxy("call_function", function, args, kwargs)

    return call
