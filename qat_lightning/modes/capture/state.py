"""Refuses forwards that keep state for their next call, which a graph would not keep.

A cache is no such state: a forward may store what it computes from its input, such as the anchors of an image
size, if its outputs do not depend on what it stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.base.nested import PLAIN, tensors_in
from qat_lightning.base.torch_internals import buffers_of, is_persistent, is_traced_constant, version_of
from qat_lightning.modes.capture.proxies import ValueProxy, proxies_in, values_of
from qat_lightning.modes.purity.impure import Impure

SKIPPED = frozenset(vars(nn.Module()))
"""The attributes of every module, which hold its children, tensors, hooks and mode."""
Stored = tuple[str, str, Any]
"""An attribute that a run assigned: the name of its module, its own name, and its value."""


class Attributes:
    """What the modules of a network hold before an example runs.

    Args:
        root: The network.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.attributes = {(m, n): v for m in root.modules() for n, v in _attributes(m)}
        self.buffers = {
            (m, n): (b, version_of(b))
            for m in root.modules()
            for n, b in buffers_of(m).items()
            if b is not None
        }
        self.assigned: list[tuple[nn.Module, str]] = []

    def refuse_writes(self, graph: fx.Graph) -> None:
        """Raises :class:`Impure` if the run wrote to a buffer; notes the plain attributes that it assigned.

        A module that `graph` calls as a whole may do both: it does so again whenever the graph runs. A buffer
        that no checkpoint holds may be assigned, as a plain attribute may.
        """
        whole = tuple(f"{node.target}." for node in graph.nodes if node.op == "call_module")
        paths = {module: f"{name}." for name, module in self.root.named_modules()}
        for (module, name), (buffer, version) in self.buffers.items():
            written = version_of(buffer) != version
            assigned = buffers_of(module).get(name) is not buffer and is_persistent(module, name)
            if (written or assigned) and not paths[module].startswith(whole):
                raise Impure(f"its forward writes to the buffer {name!r}, and a graph would not", module)
        for module, name, before, now in self.changes():
            if isinstance(before, PLAIN) and type(now) in PLAIN and not paths[module].startswith(whole):
                self.assigned.append((module, name))

    def stored(self) -> list[Stored]:
        """Returns what the run computed from its input and stored."""
        paths = {module: path for path, module in self.root.named_modules()}
        changes = [(paths[module], name, now) for module, name, _, now in self.changes() if proxies_in(now)]
        return [(path, name, values_of(now)) for path, name, now in changes]

    def refuse_dependence(self, call: Callable[[], Any], earlier: Sequence[Stored]) -> None:
        """Raises :class:`Impure` if outputs depend on what an earlier call stored, or if a call counts.

        A forward may set an attribute to what the sizes of its input demand, as long as it stays so.

        Args:
            call: Calls the network on the example, with plain tensors.
            earlier: What the run in training mode stored, if this one was in eval mode.
        """
        stored = self.stored()
        if stored or earlier or self.assigned:
            self._restore()
            expected = call()
            settled = [holder_of(module, name).get(name) for module, name in self.assigned]
            again = call() if stored or self.assigned else expected
            if stored and not same_values(expected, again):
                raise self._state(stored[0], "on which its next call depends")
            for (module, name), value in zip(self.assigned, settled, strict=True):
                if not (_equal(holder_of(module, name).get(name), value) and same_values(expected, again)):
                    raise Impure(f"its forward assigns to {name!r}, and a graph would not", module)
            for path, name, value in earlier:
                module = self.root.get_submodule(path)
                holder_of(module, name)[name] = value
            if earlier and not same_values(expected, call()):
                raise self._state(earlier[0], "in training mode, on which eval mode depends")

    def _restore(self) -> None:
        for module, name, *_ in list(self.changes()):
            values = holder_of(module, name)
            if (module, name) in self.attributes:
                values[name] = self.attributes[module, name]
            else:
                del values[name]

    def _state(self, stored: Stored, dependence: str) -> Impure:
        path, name, _ = stored
        message = f"its forward stores {name!r}, {dependence}, and a graph would not"
        return Impure(message, self.root.get_submodule(path))

    def changes(self) -> Iterator[tuple[nn.Module, str, Any, Any]]:
        """Yields the attributes that the run assigned: module, name, and the values before and now."""
        for module in self.root.modules():
            for name, now in _attributes(module):
                default = getattr(type(module), name, Attributes)
                before = self.attributes.get((module, name), default)
                if now is not before and (
                    type(now) is ValueProxy or proxies_in(now) or not _equal(now, before)
                ):
                    yield module, name, before, now


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the plain attributes of a module, and the buffers that no checkpoint holds."""
    yield from (
        (name, value)
        for name, value in vars(module).items()
        if name not in SKIPPED and not is_traced_constant(name)
    )
    yield from (
        (name, value) for name, value in buffers_of(module).items() if not is_persistent(module, name)
    )


def holder_of(module: nn.Module, name: str) -> dict[str, Any]:
    """Returns the dict in which a module keeps an attribute, or a buffer, of that name."""
    buffers: dict[str, Any] = buffers_of(module)
    return buffers if name in buffers else vars(module)


def _equal(left: Any, right: Any) -> bool:
    return type(left) is type(right) and isinstance(left, PLAIN) and bool(left == right)


def same_values(left: Any, right: Any) -> bool:
    """Whether two outputs hold equal tensors."""
    a, b = tensors_in(left), tensors_in(right)
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.allclose(x, y, equal_nan=True) for x, y in zip(a, b, strict=True)
    )
