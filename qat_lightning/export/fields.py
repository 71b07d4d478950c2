"""`Fields` replace the dataclasses in a network's outputs, so that a file runs without their classes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import wraps
from typing import Any

from torch import nn

from qat_lightning.base.nested import fields_of, is_structure, map_nested
from qat_lightning.base.torch_internals import register_mapping


class Fields(dict[str, Any]):
    """The fields of a dataclass, by name as attributes and as items, and by position.

    As in transformers' ModelOutput, a field that is None is an attribute, but no item.
    """

    def __init__(self, *args: Any, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self.absent = [name for name, value in self.items() if value is None]
        for name in self.absent:
            del self[name]

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in vars(self).get("absent", ()):
            return None
        raise AttributeError(f"The output has the fields {', '.join(self)}, and none of the name {name!r}.")

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


def as_fields(outputs: Any) -> Any:
    """Returns nested `outputs` with `Fields` in the place of dataclasses."""
    return map_nested(outputs, is_structure, _fields)


def _fields(structure: Any) -> Fields:
    return Fields({name: as_fields(value) for name, value in fields_of(structure).items()})


def returning_fields(network: nn.Module) -> nn.Module:
    """Makes `network` return `Fields` in the place of dataclasses. It is changed in place."""
    forward = network.forward

    @wraps(forward)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return as_fields(forward(*args, **kwargs))

    network.forward = plain
    return network


def _rebuilt(values: Iterable[Any], names: list[str], absent: list[str]) -> Fields:
    return Fields(zip(names, values, strict=True), **dict.fromkeys(absent))


register_mapping(
    Fields,
    "qat_lightning.Fields",
    lambda fields: [[*fields], [*fields.absent]],
    lambda values, context: _rebuilt(values, *context),
)
