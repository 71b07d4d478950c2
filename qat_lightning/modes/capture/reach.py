"""Finds the user's functions that a forward may call, by the names in its bytecode.

Nothing runs for it, so it also finds what the example's path leaves out. A function that is called in another
way, such as one in a list, is not found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from qat_lightning.modes.graph.lines import is_user_file


def code_within(code: CodeType) -> Iterator[CodeType]:
    """Yields `code` and the code of the comprehensions, lambdas and functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from code_within(constant)


def closure_of(function: FunctionType) -> dict[str, Any]:
    """Returns the values of the enclosing functions' variables that `function` uses."""
    values = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            values[name] = cell.cell_contents
    return values


def names_in(function: FunctionType) -> frozenset[str]:
    """Returns the names of globals and attributes in the code of a function."""
    return frozenset(name for code in code_within(function.__code__) for name in code.co_names)


def reached(kind: type[nn.Module]) -> list[FunctionType]:
    """Returns the user's functions that the forward of a class may call, itself included."""
    found: dict[FunctionType, None] = {}
    pending = list(_methods(kind, "forward"))
    while pending:
        function = pending.pop()
        if function not in found and is_user_file(function.__code__.co_filename):
            found[function] = None
            pending += called_by(function)
            pending += [method for name in names_in(function) for method in _methods(kind, name)]
    return list(found)


def called_by(function: FunctionType) -> list[FunctionType]:
    """Returns the functions that another one names: globals, those of modules, and those in its closure."""
    names = names_in(function)
    values = [function.__globals__.get(name) for name in names]
    modules = [value for value in values if isinstance(value, ModuleType)]
    values += [vars(module).get(name) for module in modules for name in names]
    values += closure_of(function).values()
    return [value for value in values if isinstance(value, FunctionType)]


def _methods(kind: type[Any], name: str) -> Iterator[FunctionType]:
    """Yields the methods of that name of a class and of its bases."""
    for base in kind.__mro__:
        value = vars(base).get(name)
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if isinstance(function, FunctionType):
            yield function
