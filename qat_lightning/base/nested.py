"""Walks through nested values: containers, slices, and dataclasses such as transformers' ModelOutput.

PyTorch's pytrees do not look into a dataclass that nobody registered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import fx

from qat_lightning.base.torch_internals import tree_leaves, tree_map

PLAIN = (type(None), bool, int, float, str)
"""The types of plain values."""


def map_nested(value: Any, is_leaf: Callable[[Any], bool], function: Callable[[Any], Any]) -> Any:
    """Applies `function` to each leaf in a nested `value`, and returns a value nested alike.

    What is neither a leaf nor one of these containers stays as it is.
    """
    if is_leaf(value):
        return function(value)
    kind = type(value)

    def mapped(each: Any) -> Any:
        return map_nested(each, is_leaf, function)

    if issubclass(kind, fx.Proxy):  # which may claim to be of the class of its value
        return value
    if kind in (tuple, torch.Size):
        return tuple(mapped(each) for each in value)
    if kind is list:
        return [mapped(each) for each in value]
    if kind is slice:
        return slice(mapped(value.start), mapped(value.stop), mapped(value.step))
    if isinstance(value, tuple):
        return _like_tuple(kind, [mapped(each) for each in value])
    if is_structure(value):
        given = fields_of(value)
        changed = {name: mapped(each) for name, each in given.items()}
        return value if _same(changed, given) else kind(**changed)
    if isinstance(value, dict):
        changed = {key: mapped(each) for key, each in value.items()}
        return value if _same(changed, value) else _like(value, changed)
    return _map_registered(value, mapped)


def _map_registered(value: Any, function: Callable[[Any], Any]) -> Any:
    """Applies `function` to what `value` holds if its class is registered as a pytree."""

    def is_part(each: Any) -> bool:
        return each is not value

    parts = tree_leaves(value, is_leaf=is_part)
    holds_nothing = len(parts) == 1 and parts[0] is value
    return value if holds_nothing else tree_map(function, value, is_leaf=is_part)


def is_structure(value: Any) -> bool:
    """Whether `value` is a dataclass, such as a ModelOutput."""
    return is_dataclass(value) and not isinstance(value, type)


def fields_of(structure: Any) -> dict[str, Any]:
    """Returns the fields that a dataclass is made of."""
    return {each.name: getattr(structure, each.name) for each in fields(structure) if each.init}


def map_tensors(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Applies `function` to each tensor in a nested `value`."""
    return map_nested(value, _is_tensor, function)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Returns the tensors in a nested `value`, in order."""
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, keep)
    return found


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, fx.Proxy)


def _like_tuple(kind: Any, parts: list[Any]) -> Any:
    """Returns `parts` as a NamedTuple, or as another kind of tuple, such as those of `torch.return_types`."""
    try:
        return kind(*parts)
    except TypeError:
        return kind(parts)


def _same(changed: dict[Any, Any], given: Any) -> bool:
    return all(changed[key] is given[key] for key in changed)


def _like(value: Any, changed: dict[Any, Any]) -> Any:
    """Returns `changed` as the class of `value`, such as an OrderedDict, if that can be made of a dict."""
    if type(value) is dict:
        return changed
    try:
        return type(value)(changed)
    except TypeError:
        return changed
