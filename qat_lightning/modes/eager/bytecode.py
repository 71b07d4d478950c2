"""Finds what a user's function loads, from its bytecode, on every supported Python.

Python 3.11 compiles a comprehension to a code object of its own, Python 3.12 does not; Python 3.14 loads a
small integer by an opcode of its own. The reading depends on neither.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from qat_lightning.modes.capture.reach import closure_of, code_within

_SKIPPED = ("EXTENDED_ARG", "NOP", "PUSH_NULL")  # they may lie between a load and what belongs to it
_Scopes = Mapping[str, Mapping[str, Any]]


class Load(NamedTuple):
    """A value that code loads by name.

    Attributes:
        value: The value, which is known before the code runs.
        numbers: The literal numbers in the expression around it, such as the arguments of its call. Without
            columns in the bytecode (`python -X no_debug_ranges`), every number after it.
    """

    value: Any
    numbers: frozenset[float]


def loads_of(function: FunctionType) -> Iterator[Load]:
    """Yields what a function loads, the comprehensions, lambdas and functions in it included."""
    codes = [_steps_of(dis.get_instructions(code)) for code in code_within(function.__code__)]
    local: dict[str, Any] = {}
    for steps in codes:
        local |= _imports_in(steps)
    scopes = {"FAST": local, "DEREF": local | closure_of(function), "GLOBAL": function.__globals__}
    for steps in codes:
        yield from loads_in(steps, scopes)


def loads_in(instructions: Iterable[dis.Instruction], scopes: _Scopes) -> Iterator[Load]:
    """Yields what instructions load by name, or as an attribute of a module that they loaded.

    Args:
        instructions: The bytecode.
        scopes: The values of names, by what `LOAD_` opcodes call the kind of name: FAST, DEREF and GLOBAL.
    """
    steps = _steps_of(instructions)
    value: Any = None
    for index, step in enumerate(steps):
        value = _value_of(step, value, scopes)
        if value is not None:
            yield Load(value, _numbers_around(step, steps[index + 1 :]))


def _steps_of(instructions: Iterable[dis.Instruction]) -> list[dis.Instruction]:
    return [step for step in instructions if step.opname not in _SKIPPED]


def _value_of(step: dis.Instruction, before: Any, scopes: _Scopes) -> Any:
    """Returns the value that `step` loads, given the value that the instruction before it loaded."""
    if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
        return vars(before).get(step.argval) if isinstance(before, ModuleType) else None
    for kind, values in scopes.items():
        if f"LOAD_{kind}" in step.opname:
            return values.get(_names(step)[-1])
    return None


def _names(step: dis.Instruction) -> Sequence[str]:
    """Returns what an instruction stores or loads; Python 3.13 stores or loads two local variables in one."""
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)


def _numbers_around(load: dis.Instruction, later: Sequence[dis.Instruction]) -> frozenset[float]:
    """Returns the numbers loaded after `load`, up to the end of the expression around it."""
    numbers = set()
    for step in later:
        if _is_around(step, load):
            break
        if step.opname.startswith("LOAD_") and type(step.argval) in (int, float):
            numbers.add(step.argval)
    return frozenset(numbers)


def _is_around(outer: dis.Instruction, inner: dis.Instruction) -> bool:
    """Whether the source of `outer` contains that of `inner` and more; False if columns are unknown."""
    (outer_start, outer_end), (start, end) = _span(outer), _span(inner)
    unknown = None in (*outer_start, *outer_end, *start, *end)
    same = (outer_start, outer_end) == (start, end)
    return not unknown and not same and outer_start <= start and end <= outer_end


def _span(step: dis.Instruction) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Returns where the source of an instruction begins and ends, each as line and column."""
    line, end_line, column, end_column = step.positions or (None,) * 4
    return (line, column), (end_line, end_column)


def _imports_in(steps: Iterable[dis.Instruction]) -> dict[str, Any]:
    """Returns the values of the names that the code imports itself, as far as they are loaded already."""
    found: dict[str, Any] = {}
    module = value = None
    for before, step in pairwise(steps):
        if step.opname == "IMPORT_NAME":  # `before` loads what `from` imports; `import a.b` binds `a`
            module = value = sys.modules.get(step.argval if before.argval else step.argval.split(".")[0])
        elif step.opname == "IMPORT_FROM":
            value = getattr(value, step.argval, None)
        elif step.opname.startswith("STORE_") and module is not None:
            found[_names(step)[0]], value = value, module
        if "LOAD_" in step.opname:
            module = None
    return found
