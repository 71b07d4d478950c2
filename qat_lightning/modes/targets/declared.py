"""What a user may declare of an operation that no table knows, or knows as something else."""

from __future__ import annotations

from collections.abc import Mapping

from qat_lightning.base.errors import nearest
from qat_lightning.modes.targets.rules import Kind, Rule

DECLARED: Mapping[str, Rule] = {
    "moves": Rule(Kind.MOVES),
    "averages": Rule(Kind.AVERAGES),
    "computes": Rule(Kind.COMPUTES),
    "rows": Rule(Kind.LOOKS_UP),
    "float": Rule(Kind.ENDS),
}


def check_operations(operations: object) -> None:
    """Raises if `operations` does not map to what can be declared.

    Raises:
        TypeError: It is not a mapping.
        ValueError: A value is unknown.
    """
    if operations is None:
        return
    if not isinstance(operations, Mapping):
        raise TypeError(
            "operations must map names, types or functions to what they do, such as "
            f"{{'my_package.Swish': 'computes'}}, but received {type(operations).__name__}: {operations!r}."
        )
    for pattern, value in operations.items():
        if value not in DECLARED:
            raise ValueError(
                f"operations says of {pattern!r} that it is {value!r}, but must say one of "
                f"{tuple(DECLARED)}. {nearest(str(value), DECLARED)}"
            )
