"""Replaces ReLU6 by ReLU where an eager network's code calls `F.relu6(x)` or `F.hardtanh(x, 0, 6)`.

There is no graph to edit, so that modules with such a call run their forward under a torch-function mode.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qat_lightning.base.subclass import with_forward
from qat_lightning.modes.capture.reach import closure_of, code_within
from qat_lightning.modes.eager.bytecode import Load, loads_of
from qat_lightning.modes.graph.relu6 import clamped_to_six, is_inside


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
        functions = _functions_of(type(module))
        clamps = sum(_is_clamp(load) for function in functions for load in loads_of(function))
        if clamps:
            stays = is_inside(name, kept)
            _run_under(module, _AsItIs if stays else _AsRelu)
            count += 0 if stays else clamps
    return count


def hard_sigmoids(network: nn.Module) -> tuple[str, ...]:
    """Returns the names of modules whose code calls `add_scalar`, as a hard sigmoid does before its clamp."""
    return tuple(
        name
        for name, module in network.named_modules()
        if any("add_scalar" in _names_in(function) for function in _functions_of(type(module)))
    )


def _run_under(module: nn.Module, mode: type[TorchFunctionMode]) -> None:
    """Makes the `forward` of `module` run under `mode`, in place."""
    user_class = type(module)

    @functools.wraps(user_class.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with mode():
            return user_class.forward(self, *args, **kwargs)

    module.__class__ = with_forward(user_class, forward)


def _functions_of(kind: type[nn.Module]) -> Iterator[FunctionType]:
    """Yields the user's methods, and the user's functions that they call."""
    user_classes = [each for each in kind.__mro__ if not _is_torchs(each.__module__)]
    members = [value for each in user_classes for value in vars(each).values()]
    pending = [getattr(member, "__func__", member) for member in members]  # also static and class methods
    seen: set[FunctionType] = set()
    while pending:
        function = pending.pop()
        if not inspect.isfunction(function) or function in seen or _is_torchs(function.__module__):
            continue
        seen.add(function)
        yield function
        values = {**function.__globals__, **closure_of(function)}
        pending += [values.get(name) for name in _names_in(function)]


def _names_in(function: FunctionType) -> set[str]:
    """Returns the names of the globals, attributes and enclosing variables in a function's code."""
    codes = code_within(function.__code__)
    return {name for code in codes for name in (*code.co_names, *code.co_freevars)}


def _is_torchs(module: str | None) -> bool:
    return (module or "").split(".")[0] in ("torch", "builtins")


def _is_clamp(load: Load) -> bool:
    """Whether code loads a clamp to 0…6: `F.relu6`, or `F.hardtanh` in a call with the literals 0 and 6."""
    if load.value is F.hardtanh or load.value is F.hardtanh_:
        return load.numbers >= {0, 6}
    return load.value is F.relu6
