"""Takes the example's call apart: which arguments are tensors that flow, and which decide a path."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qat_lightning.base import random_state
from qat_lightning.base.inputs import Inputs
from qat_lightning.base.nested import PLAIN, map_tensors, tensors_in


@dataclass(frozen=True)
class Argument:
    """An argument of the captured call.

    Attributes:
        name: Its name.
        value: Its value in the example, or its default.
        given: Whether the example gives it.
        default: The signature's default; `inspect.Parameter.empty` if there is none.
        kind: The kind of the signature's parameter.
        flows: Whether it holds a tensor. Then it is an input of the graph; otherwise it decides a path.
    """

    name: str
    value: Any
    given: bool
    default: Any
    kind: Any
    flows: bool


def arguments_of_call(network: nn.Module, example: Inputs) -> list[Argument]:
    """Returns the arguments in `example`'s call of `network`, in the order of the forward's signature.

    Raises:
        TypeError: The forward does not take them.
    """
    bound = inspect.signature(network.forward).bind(*example.args, **example.kwargs)
    found: list[Argument] = []
    for p in bound.signature.parameters.values():
        value = bound.arguments.get(p.name)
        if p.kind is p.VAR_POSITIONAL:
            found += [_argument(f"{p.name}_{i}", each, p) for i, each in enumerate(value or ())]
        elif p.kind is p.VAR_KEYWORD:
            extra: Mapping[str, Any] = value or {}
            found += [_argument(name, each, p, default=None) for name, each in extra.items()]
        elif p.name in bound.arguments:
            found.append(_argument(p.name, value, p, default=p.default))
        elif isinstance(p.default, PLAIN):
            found.append(Argument(p.name, p.default, False, p.default, p.kind, False))
    return found


def _argument(
    name: str, value: Any, parameter: inspect.Parameter, default: Any = inspect.Parameter.empty
) -> Argument:
    return Argument(name, value, True, default, parameter.kind, bool(tensors_in(value)))


def call_with(
    arguments: Sequence[Argument], inputs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and keyword arguments to call the forward with.

    Args:
        arguments: The arguments of the call.
        inputs: The proxy of each argument that flows.
    """
    given = [(each, inputs[each.name] if each.flows else each.value) for each in arguments if each.given]
    # What stands before further positional arguments has to be positional, too.
    many = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each, _ in given)
    named: set[Any] = {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    if not many:
        named.add(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = tuple(value for each, value in given if each.kind not in named)
    return positional, {each.name: value for each, value in given if each.kind in named}


def run(network: nn.Module, arguments: Sequence[Argument]) -> Any:
    """Returns what `network` returns for the example, which it may write into, at every time the same."""
    inputs = {each.name: map_tensors(each.value, torch.clone) for each in arguments}
    args, kwargs = call_with(arguments, inputs)
    with random_state.preserved(), torch.no_grad():
        return network.forward(*args, **kwargs)
