"""Decides which tensors of a graph are rounded, with which qparams, by the table of the backend.

A tensor is rounded where it is made, if an int8 operation makes it: all that read it read the rounded tensor.
What a float operation makes is rounded where int8 operations read it, and only for them.

Sums, products and concatenations compute in int8 only if an int8 operation reads the result, directly or
through other operations. At the end of a network rounding only loses accuracy: boxes of hundreds of pixels
and scores below 1 would be rounded with one scale. Before a softmax, the large negative number of an
attention mask would decide the scale of the scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from qat_lightning.base.torch_internals import BatchNorm
from qat_lightning.modes.graph.by_mode import ByMode
from qat_lightning.modes.graph.dropout import is_dropout
from qat_lightning.modes.graph.nodes import call_target, module_of
from qat_lightning.modes.layers.lacks_int8 import lacks_int8
from qat_lightning.modes.layers.moves import may_move_values
from qat_lightning.modes.layers.norm_relu import NormReLU
from qat_lightning.modes.layers.trained_layer import TrainedLayer
from qat_lightning.modes.passes.declare import declared_rule
from qat_lightning.modes.passes.fuse_norms import follows_float_layer
from qat_lightning.modes.passes.qconfigs import QConfigs, relu_after
from qat_lightning.modes.passes.tensors import Tensors
from qat_lightning.modes.targets.rules import Kind, Rule, Target

_COMPUTING = (Kind.LAYER, Kind.COMPUTES, Kind.COMBINES)
_PASSING = (Kind.MOVES, Kind.AVERAGES, Kind.CONCATENATES, Kind.COMBINES)


@dataclass(frozen=True)
class Rounding:
    """A tensor that is rounded.

    Attributes:
        node: What makes the tensor.
        qconfig: The QConfig that its fake-quantize comes from.
        readers: The nodes that read the rounded tensor; None for all.
        weight: Whether the tensor is a weight.
        fixed: Scale and zero point, if they are fixed.
        averaged: Whether the tensor is an average of values that are rounded with the same qparams.
    """

    node: fx.Node
    qconfig: Any
    readers: list[fx.Node] | None = None
    weight: bool = False
    fixed: tuple[float, int] | None = None
    averaged: bool = False


@dataclass
class Plan:
    """Which tensors of a graph are rounded.

    Attributes:
        roundings: The tensors, in the order of the graph.
        shared: Pairs of roundings that share their qparams.
        moving: The nodes that return values of a rounded tensor.
    """

    roundings: list[Rounding] = field(default_factory=list)
    shared: list[tuple[Rounding, Rounding]] = field(default_factory=list)
    moving: list[fx.Node] = field(default_factory=list)


def annotate(graph_module: fx.GraphModule, target: Target, qconfigs: QConfigs) -> Plan:
    """Returns the plan for a graph whose layers are fused."""
    return _Annotator(graph_module, target, qconfigs).plan()


class _Annotator:
    """Walks over a graph once backward, to see what int8 operations read, and once forward."""

    def __init__(self, graph_module: fx.GraphModule, target: Target, qconfigs: QConfigs) -> None:
        self._graph_module, self._target, self._qconfigs = graph_module, target, qconfigs
        self._tensors = Tensors()
        self._rules = {node: self._rule(node) for node in graph_module.graph.nodes}
        self._unread = self._unread_by_int8()
        self._rounded: dict[fx.Node, Rounding] = {}  # int8 results, and what only moves them
        self._at_edge: dict[fx.Node, Rounding] = {}  # float results, rounded for some readers
        self._plan = Plan()

    def plan(self) -> Plan:
        for node in self._graph_module.graph.nodes:
            rule = self._rules[node]
            if rule is None or node in self._rounded:
                continue
            if rule.kind in _COMPUTING and not (rule.kind is Kind.COMBINES and node in self._unread):
                self._compute(node, rule)
            elif rule.kind is Kind.CONCATENATES and node not in self._unread:
                self._concatenate(node)
            elif rule.kind in (Kind.MOVES, Kind.AVERAGES):
                self._pass(node, rule)
            elif rule.kind is Kind.LOOKS_UP:
                self._add(Rounding(node.args[1], self._qconfigs.of(node), [node], weight=True))
        order = {node: i for i, node in enumerate(self._graph_module.graph.nodes)}
        self._plan.roundings.sort(key=lambda rounding: order[rounding.node])
        return self._plan

    def _rule(self, node: fx.Node) -> Rule | None:
        """Returns what a user or the table says of a node; None for a float operation."""
        declared = declared_rule(node)
        if declared is not None:
            return declared if self._qconfigs.of(node) is not None else None
        module = module_of(self._graph_module, node)
        if isinstance(module, TrainedLayer):
            return self._target.rules[module.plain]
        called = module.function if isinstance(module, ByMode) else call_target(self._graph_module, node)
        if called is getattr:
            called = f".{node.args[1]}"
        rule = self._target.rules.get(called)
        if rule is None and is_dropout(self._graph_module, node):
            rule = Rule(Kind.MOVES)
        if rule is None or rule.kind in (Kind.READS_SHAPE, Kind.ENDS):
            return rule
        if isinstance(module, BatchNorm | NormReLU) and follows_float_layer(self._graph_module, node):
            return None
        is_float_layer = rule.kind is Kind.LAYER and module is not None
        if is_float_layer or self._qconfigs.of(node) is None or lacks_int8(module):
            return None
        if rule.kind is Kind.MOVES and not may_move_values(module, node):
            return None
        return None if rule.kind is Kind.COMBINES and not self._combines_tensors(node) else rule

    def _combines_tensors(self, node: fx.Node) -> bool:
        """Whether a sum or a product has two tensors as its operands, and no option such as `alpha`."""
        return not node.kwargs and len(node.args) == 2 and len(self._floating(node.args)) == 2

    def _floating(self, operands: Any) -> list[fx.Node]:
        """Returns the operands that are floating-point tensors."""
        return [x for x in operands if isinstance(x, fx.Node) and self._tensors.is_floating(x)]

    def _unread_by_int8(self) -> set[fx.Node]:
        """Finds the nodes whose results pass no int8 operation before the output or a softmax."""
        unread: set[fx.Node] = set()
        for node in reversed(self._graph_module.graph.nodes):
            rule = self._rules[node]
            ends = node.op == "output" or (rule is not None and rule.kind in (Kind.READS_SHAPE, Kind.ENDS))
            ends = ends or (rule is None and not self._target.through_float)
            passes = rule.kind in _PASSING if rule is not None else not self._has_weights(node)
            if ends or (passes and unread.issuperset(node.users)):
                unread.add(node)
        return unread

    def _has_weights(self, node: fx.Node) -> bool:
        module = module_of(self._graph_module, node)
        return module is not None and next(module.parameters(), None) is not None

    def _compute(self, node: fx.Node, rule: Rule) -> None:
        activations, weights = self._operands(node, rule)
        for source in activations:
            self._read(source, node)
        for source in weights:
            self._add(Rounding(source, self._qconfigs.of(node), [node], weight=True))
        if rule.float_result:
            return
        relu = relu_after(self._graph_module, node, self._qconfigs) if rule.relu else None
        result = relu or node
        self._rounded[node] = self._rounded[result] = self._add(
            Rounding(result, self._qconfigs.of(node), fixed=rule.fixed)
        )

    def _operands(self, node: fx.Node, rule: Rule) -> tuple[list[fx.Node], list[fx.Node]]:
        """Returns the activations and the weights that an int8 operation reads."""
        operands = [*node.args, *node.kwargs.values()]
        if rule.kind is Kind.LAYER and node.op == "call_function":
            return self._floating(operands[:1]), self._floating(operands[1:2])
        is_function_of_two = rule.kind is Kind.COMBINES or len(node.all_input_nodes) == 2
        return self._floating(operands)[: 2 if is_function_of_two else 1], []

    def _concatenate(self, node: fx.Node) -> None:
        """Gives the parts and the result one rounding."""
        parts = [self._read(part, node, free=True) for part in self._floating(node.all_input_nodes)]
        if parts:
            self._rounded[node] = parts[0]
            self._plan.moving.append(node)
            self._plan.shared += [(parts[0], part) for part in parts[1:]]

    def _pass(self, node: fx.Node, rule: Rule) -> None:
        """Passes on the rounding of the first input, if it has one."""
        inputs = node.all_input_nodes
        source = self._rounded.get(inputs[0]) if inputs else None
        if source is None:
            return
        if rule.kind is Kind.AVERAGES:
            again = self._add(Rounding(node, source.qconfig, fixed=source.fixed, averaged=True))
            self._plan.shared.append((source, again))
            source = again
        else:
            self._plan.moving.append(node)
        self._rounded[node] = source

    def _read(self, source: fx.Node, reader: fx.Node, *, free: bool = False) -> Rounding:
        """Returns the rounding that `reader` reads `source` with; if `free`, one that follows the data."""
        made = self._rounded.get(source)
        if made is not None and not (free and made.fixed is not None):
            return made
        rounding = self._at_edge.get(source)
        if rounding is None:
            rounding = self._at_edge[source] = self._add(Rounding(source, self._qconfig_of_input(reader), []))
        assert rounding.readers is not None
        rounding.readers.append(reader)
        return rounding

    def _qconfig_of_input(self, reader: fx.Node) -> Any:
        """Returns the QConfig of what a node reads. PyTorch's rule for a sigmoid holds for its result."""
        rule = self._rules[reader]
        fixed = rule is not None and rule.fixed is not None
        return (self._qconfigs.default if fixed else None) or self._qconfigs.of(reader)

    def _add(self, rounding: Rounding) -> Rounding:
        self._plan.roundings.append(rounding)
        return rounding
