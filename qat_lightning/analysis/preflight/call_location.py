"""Locates calls in the user's code: which module runs, and in which file and line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qat_lightning.modes.graph.graft import graphs
from qat_lightning.modes.graph.lines import is_user_file, stack_line

_ACCESSORS = ("__get__", "__set__")  # of attributes such as `requires_grad`, which are no operations
_GENERATED = "<eval_with_key>"  # torch.fx's file name for the code of its graphs


class CallLocation(TorchFunctionMode):
    """Tracks the running modules and the last operation. After an error, these are the ones that raised it.

    Attributes:
        path: Names of the modules, outermost first.
        call: Name of the last operation on tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = []
        self.call = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name not in _ACCESSORS:
            self.call = name
        return func(*args, **(kwargs or {}))


def hookable(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the names and modules of `module` that take hooks: all but those of TorchScript."""
    return [(n, m) for n, m in module.named_modules() if not isinstance(m, torch.jit.ScriptModule)]


@contextmanager
def follow(module: nn.Module) -> Iterator[CallLocation]:
    """Tracks which submodule of `module` runs, and what it calls, inside the block."""
    here = CallLocation()
    handles = []
    for name, child in hookable(module):
        if name:
            handles.append(child.register_forward_pre_hook(_enter(here, name)))
            handles.append(child.register_forward_hook(lambda *_: here.path.pop() and None))
    try:
        with here:
            yield here
    finally:
        for handle in handles:
            handle.remove()


def _enter(here: CallLocation, name: str) -> Any:
    return lambda *_: here.path.append(name)


def line_of_error(error: BaseException, module: nn.Module) -> str | None:
    """Returns the last line of the user's code that led to `error`, as `file:line: code`."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if frame.filename.startswith(_GENERATED):
            return _line_in_graph(module, str(frame.line))
        if is_user_file(frame.filename):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return None


@contextmanager
def call_lines(network: nn.Module) -> Iterator[dict[str, str]]:
    """Yields a dict that gets, for each submodule, the user's line that first calls it inside the block."""
    lines: dict[str, str] = {}

    def note(name: str) -> Any:
        def keep(*_: Any) -> None:
            lines.setdefault(name, _users_frame(sys._getframe(1)))

        return keep

    handles = [m.register_forward_pre_hook(note(n)) for n, m in hookable(network) if n]
    try:
        yield lines
    finally:
        for handle in handles:
            handle.remove()
    for _, graph in graphs(network):
        lines |= {str(node.target): stack_line(node) for node in graph.nodes if node.op == "call_module"}


def _users_frame(frame: FrameType | None) -> str:
    while frame is not None and not is_user_file(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return "an unknown line"
    (summary,) = traceback.extract_stack(frame, limit=1)
    return f"{summary.filename}:{summary.lineno}: {summary.line}"


def _line_in_graph(module: nn.Module, code: str) -> str | None:
    """Returns the user's line from which a line of a graph's code was traced, found by its node's name."""
    name = code.split("=")[0].split(":")[0].strip()
    for _, graph in graphs(module):
        for node in graph.nodes:
            if node.name == name and node.stack_trace:
                return stack_line(node)
    return None
