"""Computes sums, products and concatenations in float if they lead to the network's output or to a softmax.

torch.ao rounds the result of each of these operations, and what they read. An int8 operation that reads the
result needs that. At the end of a network it only loses accuracy: boxes of hundreds of pixels and scores
below 1 would be rounded with one scale. Before a softmax, the large negative number of an attention mask
would decide the scale of the scores.

Operations with a number, such as `x * 2`, always compute in float, as
:mod:`qat_lightning.modes.fx.unlowered` says. Their results are rounded only where an int8 operation reads
them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.modes.fx.unlowered import IN_FLOAT, takes_a_number
from qat_lightning.modes.graph.dropout import is_dropout
from qat_lightning.modes.graph.nodes import (
    READS_NO_VALUES,
    SHARES_INPUT_QPARAMS,
    call_target,
    fake_quantize_of,
    module_of,
)
from qat_lightning.modes.torch_ao_internals import observed_nodes

_JOINS: frozenset[Any] = frozenset(
    {*IN_FLOAT, operator.add, operator.iadd, torch.add, operator.mul, operator.imul, torch.mul}
)
_SOFTMAXES: frozenset[Any] = frozenset(
    {
        *(nn.Softmax, nn.LogSoftmax, nn.MultiheadAttention, "softmax", "log_softmax"),
        *(torch.softmax, torch.log_softmax, F.softmax, F.log_softmax),
        *(F.scaled_dot_product_attention, F.multi_head_attention_forward),
    }
)


def compute_results_in_float(prepared: fx.GraphModule) -> None:
    """Removes the rounding around such operations from a prepared graph, in place."""
    observed = observed_nodes(prepared)
    late = _late(prepared, observed)
    int8: set[fx.Node] = set()  # nodes whose result int8 kernels make
    for node in prepared.graph.nodes:
        if fake_quantize_of(prepared, node) is None:
            target = call_target(prepared, node)
            unrounded = {source: _unrounded(prepared, source) for source in node.all_input_nodes}
            joins = target in _JOINS or int8.isdisjoint(unrounded.values())
            reads_float = _is_float(prepared, node, observed) or (node in late and joins)
            if reads_float:
                _read_instead(node, {old: new for old, new in unrounded.items() if new not in int8})
                node.target = IN_FLOAT.get(target, node.target)
            if not reads_float or (target in _SOFTMAXES and node.name in observed):
                int8.add(node)
    for node in reversed(prepared.graph.nodes):
        if fake_quantize_of(prepared, node) is not None and not node.users:
            prepared.graph.erase_node(node)
    prepared.delete_all_unused_submodules()
    prepared.recompile()


def _late(prepared: fx.GraphModule, observed: set[str]) -> set[fx.Node]:
    """Finds the operations whose result passes no int8 operation before the output or a softmax."""
    late: set[fx.Node] = set()
    for node in reversed(prepared.graph.nodes):
        target = call_target(prepared, node)
        ends = node.op == "output" or target in _SOFTMAXES or target in READS_NO_VALUES
        follows = target in _JOINS | SHARES_INPUT_QPARAMS or is_dropout(prepared, node)
        passes = follows or not (node.name in observed or _has_weights(prepared, node))
        if ends or (passes and late.issuperset(node.users)):
            late.add(node)
    return late


def _is_float(prepared: fx.GraphModule, node: fx.Node, observed: set[str]) -> bool:
    """Whether a node is a float operation, wherever it is."""
    known = node.name in observed or is_dropout(prepared, node)
    ends = call_target(prepared, node) in _SOFTMAXES | READS_NO_VALUES
    return ends or not known or takes_a_number(node)


def _has_weights(prepared: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a layer, which may be kept float, or another module with parameters."""
    module = module_of(prepared, node)
    return module is not None and next(module.parameters(), None) is not None


def _unrounded(prepared: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Returns the node that a fake-quantize reads, or any other node itself."""
    return node if fake_quantize_of(prepared, node) is None else node.all_input_nodes[0]


def _read_instead(node: fx.Node, sources: dict[fx.Node, fx.Node]) -> None:
    for old, new in sources.items():
        node.replace_input_with(old, new)
