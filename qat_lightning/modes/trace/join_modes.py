"""Joins the graph of training mode and the graph of eval mode into one that follows the mode."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from qat_lightning.base.errors import UntraceableError
from qat_lightning.modes.graph.by_mode import ByMode, OutputByMode, by_mode
from qat_lightning.modes.graph.guards import InOneMode, is_guard
from qat_lightning.modes.graph.lines import stack_line


def join_modes(network: nn.Module, graph: fx.Graph, evaluate: fx.Graph) -> dict[str, Any]:
    """Joins `evaluate`, the graph of eval mode, into `graph`, that of training mode, in place.

    Returns:
        The scopes of the new nodes.

    Raises:
        UntraceableError: Eval mode calls a layer in a way that training mode does not.
    """
    return _Join(network, graph, evaluate).run()


class _Join:
    """The two graphs, and for each node of the eval graph its counterpart in the training graph."""

    def __init__(self, network: nn.Module, graph: fx.Graph, evaluate: fx.Graph) -> None:
        self.network, self.graph, self.evaluate = network, graph, evaluate
        self.counterpart: dict[fx.Node, fx.Node] = {}
        self.scopes: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """Joins the graphs, and returns the scopes of the new nodes."""
        remaining = list(self.graph.nodes)
        for node in self.evaluate.nodes:
            if node.op == "output":
                continue
            match = next((i for i, n in enumerate(remaining) if self._same_call(node, n)), None)
            if match is None:
                self._copy(node)
            else:
                self.counterpart[node] = remaining[match]
                del remaining[: match + 1]
        self._choose_arguments()
        self._limit_guards()
        self._choose_output()
        self.graph.lint()
        return self.scopes

    def _same_call(self, evaluate: fx.Node, train: fx.Node) -> bool:
        if (evaluate.op, evaluate.target) != (train.op, train.target):
            return False
        inputs = [self.counterpart.get(node) for node in evaluate.all_input_nodes]
        return inputs == train.all_input_nodes and (
            evaluate.op not in ("placeholder", "get_attr", "call_module")
            or self._arguments(evaluate) == (train.args, train.kwargs)
        )

    def _arguments(self, evaluate: fx.Node) -> tuple[Any, Any]:
        """Returns the arguments of an eval node in terms of the training graph's nodes."""
        return (
            fx.node.map_arg(evaluate.args, self.counterpart.__getitem__),
            fx.node.map_arg(evaluate.kwargs, self.counterpart.__getitem__),
        )

    def _copy(self, node: fx.Node) -> None:
        """Copies a node that only eval mode has into the training graph, just before the output."""
        if node.op == "call_module" and self._keeps_state(node):
            raise UntraceableError(
                f"{type(self.network).__name__} calls its layer {node.target!r} in eval mode in a way "
                f"that training mode does not, at {stack_line(node)}. One graph cannot do both: make "
                "the call the same in both modes, or name the submodules to quantize (modules=[…]).",
                str(node.target).rpartition(".")[0],
                stack_line(node),
            )
        with self.graph.inserting_before(next(iter(reversed(self.graph.nodes)))):
            self.counterpart[node] = self.graph.node_copy(node, self.counterpart.__getitem__)
            self.scopes[self.counterpart[node].name] = ("", type(None))
        if is_guard(self.network, self.counterpart[node]):
            self._limit(self.counterpart.pop(node), training=False)

    def _keeps_state(self, node: fx.Node) -> bool:
        """Whether a layer has statistics or trains, so that a call in both modes would differ from one."""
        layer = self.network.get_submodule(str(node.target))
        return any(True for _ in layer.buffers()) or any(each.requires_grad for each in layer.parameters())

    def _limit_guards(self) -> None:
        """Limits the guards that only training mode has to that mode."""
        shared = set(self.counterpart.values())
        for node in list(self.graph.nodes):
            if node.op == "call_function" and is_guard(self.network, node) and node not in shared:
                self._limit(node, training=True)

    def _limit(self, node: fx.Node, *, training: bool) -> None:
        value, *facts = node.args
        self._insert(node, InOneMode(node.target, training, *facts), (value,), f"{node.name}_in_one_mode")
        self.graph.erase_node(node)

    def _choose_arguments(self) -> None:
        for evaluate, train in self.counterpart.items():
            arguments = self._arguments(evaluate)
            if train.op in ("call_function", "call_method") and arguments != (
                train.args,
                train.kwargs,
            ):
                self._replace(train, by_mode(train, *arguments))

    def _replace(self, node: fx.Node, module: nn.Module) -> None:
        tensors = tuple(node.all_input_nodes) if isinstance(module, ByMode) else node.args[:1]
        new = self._insert(node, module, tensors, f"{node.name}_by_mode")
        node.replace_all_uses_with(new)
        for evaluate, train in self.counterpart.items():
            if train is node:
                self.counterpart[evaluate] = new
        self.graph.erase_node(node)

    def _insert(self, node: fx.Node, module: nn.Module, tensors: Any, name: str) -> fx.Node:
        """Inserts a call of a new module before `node`, with its line and metadata."""
        self.network.add_module(name, module)
        with self.graph.inserting_before(node):
            new = self.graph.call_module(name, tensors)
        new.meta = dict(node.meta)
        self.scopes[new.name] = (name, type(module))
        return new

    def _choose_output(self) -> None:
        outputs = next(iter(reversed(self.graph.nodes))), next(iter(reversed(self.evaluate.nodes)))
        train, evaluate = outputs[0].args[0], self._arguments(outputs[1])[0][0]
        if train == evaluate and type(train) is type(evaluate):
            return
        self.network.add_module("output_by_mode", OutputByMode())
        with self.graph.inserting_before(outputs[0]):
            new = self.graph.call_module("output_by_mode", (train, evaluate))
        self.scopes[new.name] = ("output_by_mode", OutputByMode)
        outputs[0].args = (new,)
