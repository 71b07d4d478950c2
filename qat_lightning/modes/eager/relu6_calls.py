"""Replaces ReLU6 by ReLU where an eager network's code calls `F.relu6(x)` or `F.hardtanh(x, 0, 6)`.

There is no graph to edit, so that modules with such a call run their forward under a torch-function mode.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qat_lightning.modes.graph.relu6 import clamped_to_six, is_inside
from qat_lightning.modes.graph.subclass import with_forward


class _AsRelu(TorchFunctionMode):
    """A mode that turns clamps to 0…6 into ReLUs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x = clamped_to_six(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if x is None else F.relu(x)


class _AsItIs(TorchFunctionMode):
    """A mode that protects clamps to 0…6 from an outer :class:`_AsRelu`, with a function it does not know."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        x = clamped_to_six(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if x is None else torch.ops.aten.hardtanh(x, 0.0, 6.0)


def replace_relu6_calls(network: nn.Module, kept: tuple[str, ...]) -> int:
    """Turns the clamps in the code of `network`'s modules into ReLUs, except in the modules `kept`, in place.

    Returns:
        The number of these calls.
    """
    count = 0
    for name, module in network.named_modules():
        calls = [
            called for code in _code_of(type(module)) for called in clamps_in(dis.get_instructions(code))
        ]
        if calls:
            stays = is_inside(name, kept)
            _run_under(module, _AsItIs if stays else _AsRelu)
            count += 0 if stays else len(calls)
    return count


def hard_sigmoids(network: nn.Module) -> tuple[str, ...]:
    """Returns the names of modules whose code calls `add_scalar`, as a hard sigmoid does before its clamp."""
    return tuple(
        name
        for name, module in network.named_modules()
        if any("add_scalar" in code.co_names for code in _code_of(type(module)))
    )


def _run_under(module: nn.Module, mode: type[TorchFunctionMode]) -> None:
    """Makes the `forward` of `module` run under `mode`, in place."""
    user_class = type(module)

    @functools.wraps(user_class.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with mode():
            return user_class.forward(self, *args, **kwargs)

    module.__class__ = with_forward(user_class, forward)


def _code_of(kind: type[nn.Module]) -> Iterator[CodeType]:
    """Yields the code of the user's methods, and of the user's functions that they call."""
    user_classes = [each for each in kind.__mro__ if not _is_torchs(each.__module__)]
    pending = [value for each in user_classes for value in vars(each).values() if inspect.isfunction(value)]
    seen: set[FunctionType] = set()
    while pending:
        function = pending.pop()
        if function in seen or _is_torchs(function.__module__):
            continue
        seen.add(function)
        yield function.__code__
        globals_ = [function.__globals__.get(name) for name in function.__code__.co_names]
        pending += [value for value in globals_ if inspect.isfunction(value)]


def _is_torchs(module: str | None) -> bool:
    return (module or "").split(".")[0] in ("torch", "builtins")


def clamps_in(instructions: Iterable[dis.Instruction]) -> Iterator[str]:
    """Yields the clamps to 0…6 that bytecode calls; a `hardtanh` is one if its statement loads a 6.

    Python 3.14 loads small integers by an instruction of their own, earlier versions as any constant.
    """
    open_call = ""
    for instruction in instructions:
        if instruction.argval == "relu6":
            yield "relu6"
        elif instruction.argval in ("hardtanh", "hardtanh_"):
            open_call = instruction.argval
        elif open_call and instruction.opname.startswith("LOAD_") and instruction.argval == 6:
            yield open_call
            open_call = ""
        elif instruction.opname.startswith(("STORE_", "RETURN_", "POP_TOP")):
            open_call = ""
