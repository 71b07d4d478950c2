"""Refuses forwards that keep state for their next call, which a graph would not keep.

A cache is no such state: a forward may store what it computes from its input, such as the anchors of an image
size, if its outputs do not depend on what it stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.base.nested import PLAIN, tensors_in
from qat_lightning.base.torch_internals import buffers_of, is_persistent, version_of
from qat_lightning.modes.capture.proxies import ValueProxy, proxies_in, values_of
from qat_lightning.modes.purity.impure import Impure

SKIPPED = frozenset(vars(nn.Module()))
"""The attributes of every module, which hold its children, tensors, hooks and mode."""


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

    def refuse_writes(self, graph: fx.Graph) -> None:
        """Raises :class:`Impure` if the run wrote to a buffer, or counted in a plain attribute.

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
                raise Impure(f"its forward assigns to {name!r}, and a graph would not", module)

    def refuse_accumulation(self, name_in_graph: Callable[[torch.Tensor], str | None]) -> None:
        """Raises :class:`Impure` if the run computed what it stored from what it stored before.

        Args:
            name_in_graph: Returns the name by which the graph reads a tensor.
        """
        for module, name, before, now in self.changes():
            old = name_in_graph(before) if isinstance(before, torch.Tensor) else None
            if old is not None and old in _read_by([proxy.__dict__["node"] for proxy in proxies_in(now)]):
                message = f"its forward computes {name!r} from what its last call stored there, and a graph"
                raise Impure(f"{message} would not", module)

    def refuse_dependence(self, result: Any, call: Callable[[], Any]) -> None:
        """Raises :class:`Impure` if the outputs of a second call depend on what the first one stored.

        Args:
            result: The output of the first call.
            call: Calls the network again.
        """
        caches = [(module, name, now) for module, name, _, now in self.changes() if proxies_in(now)]
        if not caches:
            return
        for module, name, now in caches:
            values: dict[str, Any] = buffers_of(module) if name in buffers_of(module) else vars(module)
            values[name] = values_of(now)
        if not same_values(values_of(result), call()):
            module, name, _ = caches[0]
            raise Impure(
                f"its forward stores {name!r}, on which its next call depends, and a graph would not", module
            )

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
    yield from ((name, value) for name, value in vars(module).items() if name not in SKIPPED)
    yield from (
        (name, value) for name, value in buffers_of(module).items() if not is_persistent(module, name)
    )


def _read_by(nodes: list[fx.Node]) -> set[str]:
    """Returns the names of the tensors of the network from which nodes are computed."""
    seen: set[fx.Node] = set()
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += node.all_input_nodes
    return {str(node.target) for node in seen if node.op == "get_attr"}


def _equal(left: Any, right: Any) -> bool:
    return type(left) is type(right) and isinstance(left, PLAIN) and bool(left == right)


def same_values(left: Any, right: Any) -> bool:
    """Whether two outputs hold equal tensors."""
    a, b = tensors_in(left), tensors_in(right)
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.allclose(x, y, equal_nan=True) for x, y in zip(a, b, strict=True)
    )
