"""Finds decisions that depend on what a cache holds from an earlier run, and not on the input.

A forward that keeps the anchors of the last image size compares that size with the size of its input. A
network that has run before, in float, holds a size. The run on the example stores another one, and computes
anew; so does the graph, always. An input of the old size must not be refused.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx, nn

from qat_lightning.base.nested import PLAIN
from qat_lightning.modes.capture.proxies import ValueProxy, proxies_in, values_of
from qat_lightning.modes.graph.guards import check_decision


def guards_of_caches(graph: fx.Graph, changes: Iterable[tuple[nn.Module, str, Any, Any]]) -> list[fx.Node]:
    """Returns the guards of decisions that only a cache makes.

    Such a decision compares what an attribute held before with what the run stored in its place, on a line
    that names the attribute.

    Args:
        graph: What the run recorded.
        changes: What the run assigned: module, name, and the values before and now.
    """
    replaced = [
        (name, old, _expression(new.__dict__["node"]))
        for _, name, before, now in changes
        if proxies_in(now) and _is_plain(before) and before != values_of(now)
        for old, new in _paired(before, now)
    ]
    return [
        node
        for node in graph.nodes
        if node.target is check_decision
        and any(name in node.args[2] and _compares(node.args[0], old, new) for name, old, new in replaced)
    ]


def _paired(before: Any, now: Any) -> Iterator[tuple[Any, ValueProxy]]:
    """Pairs a proxy, or each in a tuple or list, with what was in its place before."""
    if type(now) is ValueProxy:
        yield before, now
    elif isinstance(now, tuple | list) and isinstance(before, tuple | list):
        for pair in zip(before, now, strict=False):
            yield from _paired(*pair)


def _compares(node: fx.Node, old: Any, expression: tuple[Any, ...]) -> bool:
    """Whether a node compares an expression with an old value."""
    if node.target not in (operator.eq, operator.ne):
        return False
    left, right = node.args
    return any(
        isinstance(new, fx.Node) and _expression(new) == expression and _is_constant(constant, old)
        for new, constant in ((left, right), (right, left))
    )


def _expression(node: fx.Node) -> tuple[Any, ...]:
    """Returns what a node computes; two nodes may compute the same."""
    return (node,) if node.op == "placeholder" else (node.op, node.target, node.args, node.kwargs)


def _is_constant(constant: Any, old: Any) -> bool:
    return not isinstance(constant, fx.Node) and bool(constant == old)


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a text or None, or a tuple or list of them."""
    return all(map(_is_plain, value)) if isinstance(value, tuple | list) else isinstance(value, PLAIN)
