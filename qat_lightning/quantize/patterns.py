"""Patterns: how options such as `keep_float` name modules and functions of a network."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from torch import nn

from qat_lightning.base.errors import UntraceableError, nearest
from qat_lightning.modes.graph.functions import function_name

Pattern = str | type[nn.Module] | Callable[..., Any]
"""A name or glob of modules, the name of a type (`"torch.nn.GELU"`) or of a function (`"torch.matmul()"`), or
a type or a function itself."""
Functions = Callable[[nn.Module], frozenset[str] | None]
"""Returns the functions that a network calls; None if the network has no graph."""


def no_graph(network: nn.Module) -> None:
    """Knows the functions of no network."""


def matches(network: nn.Module, pattern: Pattern, functions: Functions, argument: str) -> list[str]:
    """Returns the names of the submodules, functions and layers for functions that a pattern matches.

    Args:
        network: A float network.
        pattern: The pattern.
        functions: Returns the functions of a network.
        argument: The option that holds the pattern, for the message.

    Raises:
        TypeError: The pattern is not a string, a module type or a function.
    """
    if is_function(pattern):
        return list({token_of(pattern)} & (functions(network) or frozenset()))
    named = [(n, m) for n, m in network.named_modules(remove_duplicate=False) if n]
    if isinstance(pattern, str):
        found = [name for name, _ in named if fnmatch.fnmatchcase(name, pattern)]
        found = found or [name for name, module in named if is_type_name(pattern, module)]
        return found or _layers_of_functions(network, pattern, functions)
    if isinstance(pattern, type) and issubclass(pattern, nn.Module):
        return [name for name, module in named if isinstance(module, pattern)]
    raise TypeError(
        f"{argument} takes names, globs or types of modules, but received "
        f"{pattern!r} of type {type(pattern).__name__}. In fx mode it also takes functions."
    )


def is_function(pattern: Pattern) -> bool:
    """Whether a pattern is a function or the name of one."""
    if isinstance(pattern, str):
        return pattern.endswith("()")
    return callable(pattern) and not isinstance(pattern, type | nn.Module)


def is_type(pattern: Pattern, network: nn.Module) -> bool:
    """Whether a pattern is a type or the name of the type of a module in `network`."""
    return isinstance(pattern, type) or any(is_type_name(pattern, module) for module in network.modules())


def token_of(pattern: Any) -> str:
    """Returns the name of a function that a pattern is."""
    return pattern if isinstance(pattern, str) else function_name(pattern)


def is_type_name(pattern: Any, module: nn.Module) -> bool:
    """Whether a pattern is the name of a module's type or of one that it derives from."""
    return isinstance(pattern, str) and any(
        _type_name(kind) in (pattern, f"torch.{pattern}") for kind in type(module).__mro__
    )


def _type_name(kind: type) -> str:
    """Returns the name of a type: `"torch.nn.GELU"`, `"my_package.blocks.Swish"`."""
    is_public = getattr(nn, kind.__name__, None) is kind
    return f"torch.nn.{kind.__name__}" if is_public else f"{kind.__module__}.{kind.__qualname__}"


def _layers_of_functions(network: nn.Module, pattern: str, functions: Functions) -> list[str]:
    """Returns the names of the layers that a graph has for functions with a weight of their own."""
    try:
        names = functions(network) or ()
    except UntraceableError:
        return []
    return [n for n in names if not is_function(n) and fnmatch.fnmatchcase(n, pattern)]


def refuse(
    networks: Sequence[nn.Module],
    pattern: Pattern,
    functions: Functions,
    argument: str,
    what: str = "nothing",
) -> NoReturn:
    """Raises the error that a pattern matches nothing, with the nearest names.

    Args:
        networks: The networks in which it matches nothing.
        pattern: The pattern.
        functions: Returns the functions of a network.
        argument: The option that holds the pattern.
        what: What the option looks for.
    """
    if is_function(pattern):
        _refuse_function(networks, token_of(pattern), functions, argument)
    shown = pattern if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))
    known = list(_known(networks, isinstance(pattern, str)))
    last = shown.rpartition(".")[2]
    raise ValueError(
        f"{argument} has {shown!r}, which matches {what} in "
        f"{' and '.join(type(n).__name__ for n in networks)}. "
        f"{nearest(last if last in known else shown, dict.fromkeys(known))} Names are relative to the "
        "network that is quantized."
    )


def _known(networks: Iterable[nn.Module], are_names: bool) -> Iterator[str]:
    """Yields the names of all modules, or of their types in the order of the alphabet."""
    named = [(name, module) for n in networks for name, module in n.named_modules() if name]
    yield from (name for name, _ in named if are_names)
    kinds = {type(module) for _, module in named}
    yield from sorted(_type_name(kind) if are_names else kind.__name__ for kind in kinds)


def _refuse_function(
    networks: Sequence[nn.Module], name: str, functions: Functions, argument: str
) -> NoReturn:
    kinds = " and ".join(type(n).__name__ for n in networks)
    graphs = [called for network in networks if (called := functions(network)) is not None]
    if not graphs:
        raise ValueError(
            f"{argument} has the function {name!r}, but in eager mode {kinds} runs its own code, and has no "
            "graph in which to find calls. Name submodules, or use mode='fx'."
        )
    own = " A function of your own must be found by its name in a module of Python, and be called by it."
    raise ValueError(
        f"{argument} has the function {name!r}, which the graph of {kinds} does not call. "
        f"{nearest(name, sorted(n for n in frozenset().union(*graphs) if is_function(n)))}"
        f"{own if argument == 'operations' else ''}"
    )
