"""Computes sums, products and concatenations in float if only float operations read their result.

torch.ao rounds the result of each of these operations, and what they read. An int8 operation that reads the
result needs that. Otherwise it only loses accuracy: at the end of a detector, boxes of hundreds of pixels and
scores below 1 would be rounded with one scale, and the large negative number of an attention mask would
decide the scale of the scores.

The network's output, softmax, operations with a number and all that torch.ao has no int8 form of count as
float operations. Operations that share their input's qparams are float after a float operation, too, if only
float operations read them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.modes.fx.unlowered import IN_FLOAT, takes_a_number
from qat_lightning.modes.graph.dropout import is_dropout
from qat_lightning.modes.graph.nodes import (
    READS_NO_VALUES,
    SHARES_INPUT_QPARAMS,
    call_target,
    fake_quantize_of,
)
from qat_lightning.modes.torch_ao_internals import observed_nodes

_JOINS: frozenset[Any] = frozenset(
    {*IN_FLOAT, operator.add, operator.iadd, torch.add, operator.mul, operator.imul, torch.mul}
)


def compute_results_in_float(prepared: fx.GraphModule) -> None:
    """Removes the rounding around such operations from a prepared graph, in place."""
    observed = observed_nodes(prepared)
    always = {node for node in prepared.graph.nodes if _is_float(prepared, node, observed)}
    late = _only_read_by(always, prepared)
    int8: set[fx.Node] = set()  # nodes whose result int8 kernels make
    for node in prepared.graph.nodes:
        if fake_quantize_of(prepared, node) is None:
            target = call_target(prepared, node)
            unrounded = {source: _unrounded(prepared, source) for source in node.all_input_nodes}
            joins = target in _JOINS or int8.isdisjoint(unrounded.values())
            reads_float = node in always or (node in late and joins)
            if reads_float:
                _read_instead(node, {old: new for old, new in unrounded.items() if new not in int8})
                node.target = IN_FLOAT.get(target, node.target)
            if not reads_float or target is nn.Softmax:
                int8.add(node)
    for node in reversed(prepared.graph.nodes):
        if fake_quantize_of(prepared, node) is not None and not node.users:
            prepared.graph.erase_node(node)
    prepared.delete_all_unused_submodules()
    prepared.recompile()


def _is_float(prepared: fx.GraphModule, node: fx.Node, observed: set[str]) -> bool:
    """Whether a node is a float operation, whatever reads its result."""
    if fake_quantize_of(prepared, node) is not None or is_dropout(prepared, node):
        return False
    reads_float = call_target(prepared, node) in {nn.Softmax, *READS_NO_VALUES}
    return reads_float or node.name not in observed or takes_a_number(node)


def _only_read_by(readers: set[fx.Node], prepared: fx.GraphModule) -> set[fx.Node]:
    """Finds the operations that only `readers` read, directly or through one another."""
    late: set[fx.Node] = set()
    for node in reversed(prepared.graph.nodes):
        follows = call_target(prepared, node) in SHARES_INPUT_QPARAMS or is_dropout(prepared, node)
        passes = follows or fake_quantize_of(prepared, node) is not None
        if (passes or node.target in _JOINS) and all(user in readers or user in late for user in node.users):
            late.add(node)
    return late


def _unrounded(prepared: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Returns the node that a fake-quantize reads, or any other node itself."""
    return node if fake_quantize_of(prepared, node) is None else node.all_input_nodes[0]


def _read_instead(node: fx.Node, sources: dict[fx.Node, fx.Node]) -> None:
    for old, new in sources.items():
        node.replace_input_with(old, new)
