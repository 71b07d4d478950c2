"""Empties the caches of a network, so that a capture records how they are computed.

A forward that keeps the anchors of the last image size computes them anew for another size. If they fit the
example already, a capture would record them as constants, and the graph would depend on what ran before. A
cache is an attribute that a forward assigns, and without which its outputs are the same. So each attribute
that a forward may assign is emptied, in several ways, until a run on the example assigns it again and returns
the same outputs.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qat_lightning.base.torch_internals import buffers_of, is_persistent
from qat_lightning.modes.capture.call import Argument, run
from qat_lightning.modes.capture.isolation import isolated_copy, use_running_statistics
from qat_lightning.modes.capture.reach import code_within, names_in, reached
from qat_lightning.modes.capture.state import SKIPPED, holder_of, same_values
from qat_lightning.modes.purity.private_generators import PrivateGenerators
from qat_lightning.modes.purity.writes import RefusedWrites

_MISSING = object()
_SETTERS = frozenset({"register_buffer", "setattr", "__setattr__"})


def empty_caches(root: nn.Module, arguments: list[Argument]) -> None:
    """Empties the caches of `root`, in place.

    Args:
        root: A copy of the network that may be changed.
        arguments: The arguments of the example's call.
    """
    kinds = dict.fromkeys(type(m) for m in root.modules() if not isinstance(m, torch.jit.ScriptModule))
    candidates = [(kind, name) for kind in kinds for name in _assigned(kind)]
    holders = {each: names for each in candidates if (names := _holders(root, *each))}
    if holders:
        trial = _Trial(root, arguments)
        while emptied := [each for each, names in holders.items() if trial.empties(each[1], names)]:
            for each in emptied:
                del holders[each]


def _assigned(kind: type[nn.Module]) -> list[str]:
    """Returns the names of the attributes that the forward of a class may assign."""
    found: set[str] = set()
    for function in reached(kind):
        for code in code_within(function.__code__):
            found |= {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
        if _SETTERS & names_in(function):
            found |= {each for each in function.__code__.co_consts if isinstance(each, str)}
    return sorted(found - SKIPPED)


def _holders(root: nn.Module, kind: type[nn.Module], name: str) -> list[str]:
    """Returns the names of the modules of a class that hold an attribute which may be a cache."""
    return [
        path
        for path, module in root.named_modules()
        if type(module) is kind and any(True for _ in _empties(module, name))
    ]


def _value(module: nn.Module, name: str) -> Any:
    """Returns the value of an attribute or buffer, or the class's default."""
    return holder_of(module, name).get(name, getattr(type(module), name, _MISSING))


def _empties(module: nn.Module, name: str) -> Iterator[Any]:
    """Yields what an attribute may hold while it is empty, unless it is of a kind that is no cache."""
    value = _value(module, name)
    is_buffer = name in buffers_of(module)
    if (is_buffer and is_persistent(module, name)) or isinstance(value, bool | str) or callable(value):
        return
    if value is _MISSING or hasattr(value, "__get__"):
        return
    if not is_buffer:
        yield _MISSING
    yield None
    if isinstance(value, torch.Tensor):
        yield value.new_empty((0,) * max(value.ndim, 1))
    elif isinstance(value, int | float | tuple):
        yield () if isinstance(value, tuple) else type(value)()
        if isinstance(value, tuple):
            yield (None,) * len(value)


class _Trial:
    """Runs copies of a network on an example.

    Args:
        root: The network.
        arguments: The arguments of the example's call.
    """

    def __init__(self, root: nn.Module, arguments: list[Argument]) -> None:
        self.root, self.arguments = root, arguments
        self.expected = self._run(self._copy())

    def empties(self, name: str, holders: list[str]) -> bool:
        """Empties the attribute `name` of those modules that assign it again, if that changes no output."""
        if self.expected is None:
            return False
        for empty in _empties(self.root.get_submodule(holders[0]), name):
            copy = self._copy()
            for path in holders:
                _set(copy.get_submodule(path), name, empty)
            outputs = self._run(copy)
            filled = [path for path in holders if _is_filled(copy.get_submodule(path), name, empty)]
            if filled and outputs is not None and same_values(self.expected[0], outputs[0]):
                for path in filled:
                    _set(self.root.get_submodule(path), name, empty)
                return True
        return False

    def _copy(self) -> nn.Module:
        copy = isolated_copy(self.root, training=self.root.training)
        use_running_statistics(copy)
        return copy

    def _run(self, copy: nn.Module) -> tuple[Any] | None:
        """Returns what `copy` returns for the example, or None if it fails."""
        generators = PrivateGenerators(copy)
        try:
            with RefusedWrites(copy):
                return (run(copy, self.arguments),)
        except Exception:  # of the user's code: it needs what the attribute held
            return None
        finally:
            generators.restore()


def _set(module: nn.Module, name: str, value: Any) -> None:
    values = holder_of(module, name)
    if value is _MISSING:
        values.pop(name, None)
    else:
        values[name] = value


def _is_filled(module: nn.Module, name: str, empty: Any) -> bool:
    """Whether a run has assigned an attribute that was empty."""
    return holder_of(module, name).get(name, _MISSING) is not empty
