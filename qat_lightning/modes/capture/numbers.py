"""Lets `len(x)` and `int(x.shape[0])` flow, which Python would make plain ints of.

The functions that call `len` or `int` run as copies with globals of their own, in which these names are
replaced. Only the modules of the capture get the copies, so other threads see the originals.
"""

from __future__ import annotations

import dis
from collections.abc import Container, Iterable, Mapping
from contextlib import AbstractContextManager
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn

from qat_lightning.base.subclass import other_classes
from qat_lightning.modes.capture.proxies import ValueProxy
from qat_lightning.modes.capture.reach import called_by, code_within, names_in, reached


def flowing_numbers(root: nn.Module) -> AbstractContextManager[None]:
    """Gives the modules in `root` classes, inside the block, whose `len()` and `int()` keep proxies."""
    modules = [m for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)]
    functions = dict.fromkeys(f for kind in dict.fromkeys(map(type, modules)) for f in reached(kind))
    copies = _copies(functions)
    classes = {kind: _with_copies(kind, copies) for kind in dict.fromkeys(map(type, modules))}
    return other_classes({m: classes[type(m)] for m in modules if classes[type(m)] is not type(m)})


def length(value: Any) -> Any:
    """Does what `len` does, but returns the size of a captured tensor."""
    if type(value) is ValueProxy and isinstance(value.__dict__["value"], torch.Tensor) and value.ndim:
        return value.size(0)
    return len(value)


def integer(*args: Any, **kwargs: Any) -> Any:
    """Does what `int` does, but returns a captured size as it is, and records that a number is cut off."""
    value = args[0].__dict__["value"] if len(args) == 1 and type(args[0]) is ValueProxy else None
    if type(value) is int:
        return args[0]
    if type(value) is float:
        return args[0].tracer.create_proxy("call_function", int, args, kwargs)
    return int(*args, **kwargs)


_REPLACED = {"len": length, "int": integer}


def _replaced_in(function: FunctionType) -> dict[str, Any]:
    """Returns what to replace in a function: the builtins that it calls, and uses in no other way.

    As a class, in `isinstance(x, int)` or `dtype=int`, `int` has to stay what it is.
    """
    loads = [
        step
        for code in code_within(function.__code__)
        for step in dis.get_instructions(code)
        if step.opname == "LOAD_GLOBAL" and step.argval in _REPLACED
    ]
    names = {step.argval for step in loads} - {step.argval for step in loads if not _is_call(step)}
    return {name: _REPLACED[name] for name in names if name not in function.__globals__}


def _is_call(load: dis.Instruction) -> bool:
    """Whether a global is loaded to be called: then an empty place for `self` is loaded with it."""
    return load.arg is not None and load.arg & 1 == 1


def _copies(functions: Iterable[FunctionType]) -> dict[FunctionType, FunctionType]:
    """Copies the functions that call `len` or `int`, and those that call copied ones by name."""
    replaced = {function: names for function in functions if (names := _replaced_in(function))}
    callers: dict[FunctionType, list[FunctionType]] = {}
    for function in functions:
        for each in called_by(function):
            callers.setdefault(each, []).append(function)
    pending = list(replaced)
    while pending:
        for caller in callers.get(pending.pop(), ()):
            if caller not in replaced:
                replaced[caller] = {}
                pending.append(caller)
    copies = {function: _empty_copy(function, replaced) for function in replaced}
    for function, names in replaced.items():
        _fill(copies[function], function, copies, names)
    return copies


def _empty_copy(function: FunctionType, copied: Container[FunctionType]) -> FunctionType:
    """Returns a copy of a function, with globals of its own, and empty cells for copies in its closure."""
    cells = function.__closure__ and tuple(
        CellType() if _function_in(cell) in copied else cell for cell in function.__closure__
    )
    copy = FunctionType(function.__code__, {}, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__, copy.__qualname__ = function.__kwdefaults__, function.__qualname__
    copy.__module__ = function.__module__
    copy.__dict__.update(vars(function))
    return copy


def _function_in(cell: CellType) -> FunctionType | None:
    """Returns the function in a cell of a closure; None if there is something else, or nothing yet."""
    try:
        return cell.cell_contents if isinstance(cell.cell_contents, FunctionType) else None
    except ValueError:
        return None


def _fill(
    copy: FunctionType,
    function: FunctionType,
    copies: Mapping[FunctionType, FunctionType],
    names: Mapping[str, Any],
) -> None:
    """Gives a copy the globals and the closure of the original, with copies of the functions in them."""
    copy.__globals__.update({**function.__globals__, **names})
    for name in names_in(function):
        value = function.__globals__.get(name)
        if isinstance(value, FunctionType) and value in copies:
            copy.__globals__[name] = copies[value]
    for cell, own in zip(function.__closure__ or (), copy.__closure__ or (), strict=True):
        if own is not cell:
            own.cell_contents = copies[cell.cell_contents]


def _with_copies(kind: type[nn.Module], copies: dict[FunctionType, FunctionType]) -> type[nn.Module]:
    """Returns a subclass of a class with the copies of its functions; the class itself if there is none."""
    own: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        for name, value in vars(base).items():
            own.pop(name, None)
            if isinstance(value, FunctionType) and value in copies:
                own[name] = copies[value]
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**own, **names}) if own else kind
