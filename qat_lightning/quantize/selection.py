"""Selects what to quantize: the networks in a LightningModule, and the layers in them that stay float."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from torchmetrics import Metric, MetricCollection

from qat_lightning.base.errors import nearest
from qat_lightning.modes.graph.quantizable import QUANTIZABLE, holds_quantizable
from qat_lightning.modes.graph.relu6 import is_inside
from qat_lightning.modes.qconfig import Override, Overrides, check_override
from qat_lightning.quantize.patterns import (
    Functions,
    Pattern,
    is_function,
    is_type,
    matches,
    no_graph,
    refuse,
    token_of,
)

Operations = Mapping[Any, str]
"""What is declared of operations, by pattern."""
ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class FoundNetworks:
    """The networks and the loose layers of a LightningModule.

    Attributes:
        networks: Names of the children that are networks (containers with quantizable layers).
        loose: Names of the quantizable layers that are direct children of the module.
    """

    networks: tuple[str, ...]
    loose: tuple[str, ...]


def find_networks(module: nn.Module) -> FoundNetworks:
    """Finds the networks and the loose layers of `module`. Metrics count as neither."""
    networks, loose = [], []
    for name, child in _children(module):
        if isinstance(child, QUANTIZABLE):
            loose.append(name)
        elif holds_quantizable(child):
            networks.append(name)
    return FoundNetworks(tuple(networks), tuple(loose))


def _children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields the children by name. A ModuleList or ModuleDict is replaced by its own children."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and not isinstance(child, MetricCollection):
            yield from _children(child, f"{prefix}{name}.")
        elif not isinstance(child, Metric | MetricCollection):
            yield prefix + name, child


def check_modules(module: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Returns `names` if each is a submodule of `module` that holds quantizable layers.

    Raises:
        ValueError: A name matches nothing, or nothing quantizable, or a single layer, or is inside another
            name.
    """
    known = [name for name, _ in module.named_modules(remove_duplicate=False) if name]
    for name in names:
        if name not in known:
            raise ValueError(
                f"modules must name submodules of {type(module).__name__}, but it has none called "
                f"{name!r}. {nearest(name, known)}"
            )
        if not holds_quantizable(module.get_submodule(name)):
            raise ValueError(
                f"modules names {name!r}, which holds no convolution and no linear layer, so there is "
                "nothing to quantize in it. Leave it out."
            )
        if isinstance(module.get_submodule(name), QUANTIZABLE):
            raise ValueError(
                f"modules names {name!r}, which is a single layer. Quantized alone, it could not be fused "
                "with the layers around it. Name the network that holds it."
            )
        outer = [other for other in names if name.startswith(f"{other}.")]
        if outer:
            raise ValueError(
                f"modules names {name!r}, which is inside {outer[0]!r}, and names that too. Name one of them."
            )
    return tuple(names)


def resolve_keep_float(
    network: nn.Module, patterns: Sequence[Pattern], functions: Functions = no_graph
) -> tuple[str, ...]:
    """Returns the names of the submodules and functions that `patterns` keep float.

    Of nested submodules that match, only the outermost is named. Names are in the order of registration.

    Args:
        network: A float network.
        patterns: Names, globs (`"layer4.*"`) or types of modules, or functions or their names
            (`"torch.matmul()"`).
        functions: Returns the functions that a network calls, or None if the network has no graph.

    Raises:
        TypeError: A pattern is not a string, a module type or a function.
        ValueError: A pattern matches nothing.
    """
    functions = functools.cache(functions)
    split_patterns([network], patterns, functions)
    matched = {name for p in patterns for name in matches(network, p, functions, "keep_float")}
    outermost = [name for name in matched if not any(name.startswith(f"{other}.") for other in matched)]
    order = {name: i for i, (name, _) in enumerate(network.named_modules(remove_duplicate=False))}
    return tuple(sorted(outermost, key=lambda name: (order.get(name, len(order)), name)))


def split_patterns(
    networks: Sequence[nn.Module], patterns: Sequence[Pattern], functions: Functions = no_graph
) -> list[tuple[Pattern, ...]]:
    """Returns, for each network, the patterns that match something in it.

    Raises:
        TypeError: A pattern is not a string, a module type or a function.
        ValueError: A pattern matches nothing in any network.
    """
    functions = functools.cache(functions)
    for pattern in patterns:
        if not any(matches(network, pattern, functions, "keep_float") for network in networks):
            refuse(networks, pattern, functions, "keep_float")
    return [
        tuple(p for p in patterns if matches(network, p, functions, "keep_float")) for network in networks
    ]


def resolve_overrides(
    network: nn.Module, overrides: Overrides, functions: Functions = no_graph
) -> dict[str, Override | None]:
    """Returns the override of each layer, other module and function that a pattern matches.

    A name or glob means the layers in what it matches. A type or a whole name also means modules that hold no
    layers. Where several match, the last decides.

    Raises:
        TypeError: A pattern or a value is of the wrong type.
        ValueError: A pattern matches nothing.
    """
    functions = functools.cache(functions)
    (split,) = split_overrides([network], overrides, functions)
    return _by_name(network, split, functions, _overridden)


def split_overrides(
    networks: Sequence[nn.Module], overrides: Overrides, functions: Functions = no_graph
) -> list[dict[Pattern, Override | None]]:
    """Returns, for each network, the overrides that match in it.

    Raises:
        TypeError: A pattern or a value is of the wrong type.
        ValueError: A pattern matches nothing in any network.
    """
    for value in overrides.values():
        check_override(value)
    return _split(networks, overrides, functools.cache(functions), _overridden)


def resolve_operations(
    network: nn.Module, operations: Operations, functions: Functions = no_graph
) -> dict[str, str]:
    """Returns what is declared of each module and function that a pattern matches; the last decides.

    Raises:
        TypeError: A pattern is of the wrong type.
        ValueError: A pattern matches nothing, or a module that holds layers.
    """
    functions = functools.cache(functions)
    (split,) = split_operations([network], operations, functions)
    return _by_name(network, split, functions, _declared)


def split_operations(
    networks: Sequence[nn.Module], operations: Operations, functions: Functions = no_graph
) -> list[dict[Pattern, str]]:
    """Returns, for each network, the declared operations that are in it.

    Raises:
        TypeError: A pattern is of the wrong type.
        ValueError: A pattern matches nothing in any network, or a module that holds layers.
    """
    return _split(networks, operations, functools.cache(functions), _declared)


def names_to_declare(network: nn.Module, operations: Operations) -> frozenset[str]:
    """Returns the names of modules and functions that `operations` may declare, before anything is traced."""
    modules = {p: v for p, v in operations.items() if not is_function(p)}
    named = [name for p in modules for name in matches(network, p, no_graph, "operations")]
    return frozenset([*named, *(token_of(p) for p in operations if is_function(p))])


_Find = Callable[[nn.Module, Pattern, Functions], list[str]]


def _by_name(
    network: nn.Module, values: Mapping[Pattern, ValueT], functions: Functions, find: _Find
) -> dict[str, ValueT]:
    return {name: value for pattern, value in values.items() for name in find(network, pattern, functions)}


def _split(
    networks: Sequence[nn.Module], values: Mapping[Pattern, ValueT], functions: Functions, find: _Find
) -> list[dict[Pattern, ValueT]]:
    for pattern in values:
        if not any(find(network, pattern, functions) for network in networks):
            layers = find is _overridden and isinstance(pattern, str)
            what = "no convolution and no linear layer" if layers else "nothing"
            refuse(networks, pattern, functions, _ARGUMENTS[find], what)
    return [{p: v for p, v in values.items() if find(network, p, functions)} for network in networks]


def _overridden(network: nn.Module, pattern: Pattern, functions: Functions) -> list[str]:
    """Returns the names of the functions and layers that an override means, and of modules without layers."""
    if is_function(pattern):
        return matches(network, pattern, functions, "overrides")
    roots = tuple(matches(network, pattern, no_graph, "overrides"))
    named = list(network.named_modules(remove_duplicate=False))
    layers = {name for name, m in named if isinstance(m, QUANTIZABLE) and is_inside(name, roots)}
    if pattern in roots or is_type(pattern, network):
        layers |= {name for name, m in named if name in roots and not holds_quantizable(m)}
    return [name for name, _ in named if name in layers]


def _declared(network: nn.Module, pattern: Pattern, functions: Functions) -> list[str]:
    """Returns the names of the modules and functions that `operations` means."""
    if is_function(pattern):
        return matches(network, pattern, functions, "operations")
    names = matches(network, pattern, no_graph, "operations")
    for name in names:
        if holds_quantizable(network.get_submodule(name)):
            raise ValueError(
                f"operations declares {name!r} to be one operation, but it holds layers, which would stay "
                "float. Declare the functions and modules between its layers, or keep it float "
                f"(keep_float=[{name!r}])."
            )
    return names


_ARGUMENTS: dict[_Find, str] = {_overridden: "overrides", _declared: "operations"}
