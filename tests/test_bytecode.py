"""What code loads is read from the bytecode of every Python: real bytecode of this one, made-up of others."""

from __future__ import annotations

import dis
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import relu6

from qat_lightning.modes.eager.bytecode import loads_in, loads_of

LIMITS = {0, 6}


def limits(function: Any) -> list[bool]:
    """For each `hardtanh` that a function loads, whether the limits 0 and 6 are in its call."""
    clamps = (F.hardtanh, F.hardtanh_)
    return [
        load.numbers >= LIMITS for load in loads_of(function) if any(load.value is clamp for clamp in clamps)
    ]


def relu6s(function: Any) -> int:
    return sum(load.value is F.relu6 for load in loads_of(function))


def test_the_numbers_of_a_call() -> None:
    def split(x: Any) -> Any:
        return (
            F
            .hardtanh_(
                x,
                0,
                max_val=6.0,
            )
        )  # fmt: skip

    def several(x: Any, y: Any) -> Any:
        x, y = F.hardtanh(x, -1, 1), F.hardtanh(y, min_val=-6, max_val=6)
        return x * 6 + 0, F.hardtanh(y, 0, 6), list(range(0, 6))  # noqa: PIE808

    assert limits(lambda x: F.hardtanh(x, 0, 6)) == [True]
    assert limits(lambda x: F.hardtanh(sum(y for y in x), max_val=6.0, min_val=0.0)) == [True]
    assert limits(lambda x: F.hardtanh(torch.stack([y + 1 for y in x]), 0, 6)) == [True]
    assert limits(lambda x: F.hardtanh(x, 0, 6 if x.ndim else 1)) == [True]
    assert limits(lambda x: partial(F.hardtanh, min_val=0, max_val=6)(x)) == [True]
    assert limits(lambda x: F.hardtanh(x)) == [False]
    assert limits(lambda x: F.hardtanh(x, -1.0, 1.0) * 6 + 0) == [False]
    assert limits(lambda x: F.hardtanh(x, -6, 6, False)) == [False]
    assert limits(lambda x: x.hardtanh(0, 6)) == []
    assert limits(split) == [True]
    assert limits(several) == [False, False, True]


def test_a_name_is_what_it_means_where_it_stands() -> None:
    def inside(x: Any) -> Any:
        from torch.nn import functional, init

        return functional.relu6(x), init.relu6(x), (lambda: functional.relu6(x))()  # type: ignore[attr-defined]

    def function(x: Any) -> Any:
        from torch.nn.functional import relu, relu6

        return relu6(relu(x))

    def dotted(x: Any, y: Any) -> Any:
        import torch.nn.functional
        import torch.nn.functional as functions

        return y + functions.relu6(x), torch.nn.functional.relu6(x)

    def on_one_line(x: Any) -> Any:
        import torch.nn.functional as G; H = x; G.relu6(H.relu6(H))  # noqa: E702, I001  # fmt: skip

    def shadowed(relu6: Any, F: Any) -> Any:
        return relu6(F.relu6(0), F.hardtanh(0, 6))

    def attributes(x: Any) -> Any:
        x.relu6 = x.kind == "relu6"
        return x.relu6(x.functional.relu6, x.F.relu6, x(F).relu6, [F][0].relu6)

    enclosing = F
    assert relu6s(lambda x: [F.relu6(y) for y in x]) == 1
    assert relu6s(lambda x: enclosing.relu6(torch.nn.functional.relu6(nn.functional.relu6(x)))) == 3
    assert relu6s(lambda x: relu6(x)) == 1
    assert [relu6s(each) for each in (inside, function, dotted, on_one_line)] == [2, 1, 2, 1]
    assert [relu6s(each) for each in (shadowed, attributes)] == [0, 0]


def test_a_name_of_a_high_index() -> None:
    names = ", ".join(f"f.name_{index}" for index in range(300))
    scope: dict[str, Any] = {"F": F}
    exec(f"def long(f): return ({names}, F.relu6)", scope)
    exec(f"def late(f): {names}; import torch.nn.functional; torch.nn.functional.relu6(f)", scope)
    assert any(step.opname == "EXTENDED_ARG" for step in dis.get_instructions(scope["long"]))
    assert [relu6s(scope[name]) for name in ("long", "late")] == [1, 1]


def test_an_enclosing_variable_without_a_value_yet() -> None:
    def function() -> Any:
        return later.relu6  # type: ignore[has-type]

    assert relu6s(function) == 0
    later: Any = F
    assert relu6s(function) == 1


class Step(NamedTuple):
    """An instruction, as far as it is read."""

    opname: str
    argval: Any
    positions: Any = None


NOWHERE = (1, 1, None, None)  # as in a Python started with `-X no_debug_ranges`
F_HARDTANH = {
    "3.11": [Step("LOAD_GLOBAL", "F", (1, 1, 0, 1)), Step("LOAD_METHOD", "hardtanh", (1, 1, 0, 10))],
    "3.14": [
        Step("LOAD_FAST_BORROW_LOAD_FAST_BORROW", ("x", "F"), (1, 1, 0, 1)),
        Step("LOAD_ATTR", "hardtanh", (1, 1, 2, 10)),  # as on a line of its own
        Step("PUSH_NULL", None, (1, 1, 0, 10)),
    ],
}


@pytest.mark.parametrize(
    ("version", "constant"), [("3.11", "LOAD_CONST"), ("3.14", "LOAD_CONST"), ("3.14", "LOAD_SMALL_INT")]
)
def test_the_bytecode_of_other_pythons(version: str, constant: str) -> None:
    def numbers(*steps: Step) -> list[frozenset[float]]:
        scopes = {kind: {"F": F} for kind in ("FAST", "GLOBAL")}
        found = loads_in([*F_HARDTANH[version], *steps], scopes)  # type: ignore[list-item]
        return [load.numbers for load in found if load.value is F.hardtanh]

    x = Step("LOAD_FAST_BORROW", "x", (1, 1, 11, 12))
    zero, six = Step(constant, 0, (1, 1, 14, 15)), Step(constant, 6, (1, 1, 17, 18))
    call, later = Step("CALL", 3, (1, 1, 0, 19)), Step(constant, 7, (1, 1, 22, 23))
    assert numbers(x, zero, six, call, later) == [{0, 6}]
    without_columns = [Step(opname, argval, NOWHERE) for opname, argval, _ in (x, zero, six, call, later)]
    assert numbers(*without_columns) == [{0, 6, 7}]
    assert numbers(*(Step(opname, argval) for opname, argval, _ in (x, zero, six))) == [{0, 6}]
