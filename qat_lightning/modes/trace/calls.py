"""Functions that a trace cannot look into, such as those that compute with sizes: recorded as calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, FunctionType
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate


@dataclass(frozen=True)
class Whole:
    """What a trace does not look into.

    Attributes:
        modules: Names of modules.
        functions: Functions, each with the namespace where its caller found it.
    """

    modules: frozenset[str] = frozenset()
    functions: tuple[tuple[dict[str, Any], FunctionType], ...] = ()

    def with_culprit(
        self, error: BaseException | None, network: nn.Module, splittable: Callable[[nn.Module], bool]
    ) -> Whole | None:
        """Adds what failed to be traced: the innermost function, or module that is not `splittable`.

        None if there is neither, or if it is in here already.
        """
        names = {module: name for name, module in network.named_modules()}
        frames = _frames(error)
        for caller, frame in zip(reversed(frames[:-1]), reversed(frames[1:]), strict=True):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                name = names.get(module, "")
                if not name or splittable(module) or name in self.modules:
                    return None
                return Whole(self.modules | {name}, self.functions)
            function = caller.f_globals.get(frame.f_code.co_name)
            if isinstance(function, FunctionType) and function.__code__ is frame.f_code:
                if _is_ours(function) or any(f is function for _, f in self.functions):
                    continue
                return Whole(self.modules, (*self.functions, (caller.f_globals, function)))
        return None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """While it lasts, a call of one of the functions with a proxy is recorded."""
        for namespace, function in self.functions:
            namespace[function.__name__] = _recording(function)
        try:
            yield
        finally:
            for namespace, function in self.functions:
                namespace[function.__name__] = function


def _is_ours(function: FunctionType) -> bool:
    return function.__module__.split(".")[0] in ("torch", "qat_lightning")


def _frames(error: BaseException | None) -> list[FrameType]:
    """From the outermost to the innermost."""
    frames, traceback = [], error.__traceback__ if error else None
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return frames


def _recording(function: FunctionType) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        proxies: list[fx.Proxy] = []
        map_aggregate((args, kwargs), lambda a: proxies.append(a) if isinstance(a, fx.Proxy) else None)
        if not proxies:
            return function(*args, **kwargs)
        return proxies[0].tracer.create_proxy("call_function", function, args, kwargs)

    return call
