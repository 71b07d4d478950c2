"""Selects what to quantize: the networks in a LightningModule, and the layers in them that stay float."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn
from torchmetrics import Metric, MetricCollection

from qat_lightning.base.errors import UntraceableError, nearest
from qat_lightning.modes.graph.functions import function_name
from qat_lightning.modes.graph.quantizable import QUANTIZABLE, holds_quantizable
from qat_lightning.modes.graph.relu6 import is_inside
from qat_lightning.modes.qconfig import Override, Overrides, check_override

FloatPattern = str | type[nn.Module] | Callable[..., Any]
Functions = Callable[[nn.Module], frozenset[str] | None]


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
    network: nn.Module, patterns: Sequence[FloatPattern], functions: Functions = lambda network: None
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
    matched = {name for pattern in patterns for name in _matches(network, pattern, functions)}
    outermost = [name for name in matched if not any(name.startswith(f"{other}.") for other in matched)]
    order = {name: i for i, (name, _) in enumerate(network.named_modules(remove_duplicate=False))}
    return tuple(sorted(outermost, key=lambda name: (order.get(name, len(order)), name)))


def resolve_overrides(network: nn.Module, overrides: Overrides) -> dict[str, Override | None]:
    """Returns the override of each convolution and linear layer that a name or glob matches.

    Raises:
        TypeError: A value is not an override.
        ValueError: A name or glob matches no such layer.
    """
    (split,) = split_overrides([network], overrides)
    return {name: value for pattern, value in split.items() for name in _layers(network, pattern)}


def split_overrides(networks: Sequence[nn.Module], overrides: Overrides) -> list[dict[str, Override | None]]:
    """Returns, for each network, the overrides that match a layer in it.

    Raises:
        TypeError: A value is not an override.
        ValueError: A name or glob matches no layer in any network.
    """
    for pattern, value in overrides.items():
        check_override(value)
        if not any(_layers(network, pattern) for network in networks):
            _refuse(networks, pattern, "overrides")
    return [{p: value for p, value in overrides.items() if _layers(network, p)} for network in networks]


def _layers(network: nn.Module, pattern: str) -> list[str]:
    """Returns the names of the convolutions and linear layers that match, or are inside a match."""
    roots = tuple(_matches(network, pattern))
    named = network.named_modules(remove_duplicate=False)
    return [name for name, m in named if isinstance(m, QUANTIZABLE) and is_inside(name, roots)]


def split_patterns(
    networks: Sequence[nn.Module],
    patterns: Sequence[FloatPattern],
    functions: Functions = lambda network: None,
) -> list[tuple[FloatPattern, ...]]:
    """Returns, for each network, the patterns that match something in it.

    Raises:
        TypeError: A pattern is not a string, a module type or a function.
        ValueError: A pattern matches nothing in any network.
    """
    functions = functools.cache(functions)
    for pattern in patterns:
        if not any(_matches(network, pattern, functions) for network in networks):
            if _is_function(pattern):
                _refuse_function(networks, _token(pattern), functions)
            _refuse(networks, pattern)
    return [tuple(p for p in patterns if _matches(network, p, functions)) for network in networks]


def _matches(
    network: nn.Module, pattern: FloatPattern, functions: Functions = lambda network: None
) -> list[str]:
    if _is_function(pattern):
        return list({_token(pattern)} & (functions(network) or frozenset()))
    named = [(n, m) for n, m in network.named_modules(remove_duplicate=False) if n]
    if isinstance(pattern, str):
        found = [name for name, _ in named if fnmatch.fnmatchcase(name, pattern)]
        return found or _layers_of_functions(network, pattern, functions)
    if isinstance(pattern, type) and issubclass(pattern, nn.Module):
        return [name for name, module in named if isinstance(module, pattern)]
    raise TypeError(
        "keep_float takes names, globs or types of modules, but received "
        f"{pattern!r} of type {type(pattern).__name__}. In fx mode it also takes functions."
    )


def _layers_of_functions(network: nn.Module, pattern: str, functions: Functions) -> list[str]:
    """Returns the names of the layers that a graph has for functions with a weight of their own."""
    try:
        names = functions(network) or ()
    except UntraceableError:
        return []
    return [n for n in names if not _is_function(n) and fnmatch.fnmatchcase(n, pattern)]


def _is_function(pattern: FloatPattern) -> bool:
    if isinstance(pattern, str):
        return pattern.endswith("()")
    return callable(pattern) and not isinstance(pattern, type | nn.Module)


def _token(pattern: Any) -> str:
    return pattern if isinstance(pattern, str) else function_name(pattern)


def _refuse_function(networks: Sequence[nn.Module], name: str, functions: Functions) -> NoReturn:
    kinds = " and ".join(type(n).__name__ for n in networks)
    graphs = [called for network in networks if (called := functions(network)) is not None]
    if not graphs:
        raise ValueError(
            f"keep_float has the function {name!r}, but in eager mode {kinds} runs its own code, and has no "
            "graph in which to find calls. Name submodules, or use mode='fx'."
        )
    raise ValueError(
        f"keep_float has the function {name!r}, which the graph of {kinds} does not call. "
        f"{nearest(name, sorted(n for n in frozenset().union(*graphs) if _is_function(n)))}"
    )


def _refuse(networks: Sequence[nn.Module], pattern: Any, argument: str = "keep_float") -> NoReturn:
    modules = [(name, m) for n in networks for name, m in n.named_modules() if name]
    if isinstance(pattern, str):
        shown, known = pattern, [name for name, _ in modules]
    else:
        shown, known = pattern.__name__, sorted({type(module).__name__ for _, module in modules})
    last = shown.rpartition(".")[2]
    what = "nothing" if argument == "keep_float" else "no convolution and no linear layer"
    raise ValueError(
        f"{argument} has {shown!r}, which matches {what} in "
        f"{' and '.join(type(n).__name__ for n in networks)}. "
        f"{nearest(last if last in known else shown, dict.fromkeys(known))} Names are relative to the "
        "network that is quantized."
    )
