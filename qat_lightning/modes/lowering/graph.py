"""The graph that a lowering writes: nodes, and the modules that they call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from qat_lightning.modes.graph.constants import Constants
from qat_lightning.modes.lowering.int8.edges import Dequantize
from qat_lightning.modes.lowering.int8.qparams import QParams
from qat_lightning.modes.lowering.unpickling import Retracer


class Bytes(NamedTuple):
    """A tensor of bytes, or several with the same qparams.

    Attributes:
        node: The node of the new graph that computes it.
        qparams: Its qparams.
        rounding: The module of the reference graph that has these qparams. What becomes of the graph depends
            on which modules are the same, and never on numbers: a file then loads into an untrained network.
    """

    node: fx.Node
    qparams: QParams
    rounding: nn.Module


class Writer:
    """Writes a graph of bytes beside the reference graph that it follows.

    Args:
        reference: The reference graph.

    Attributes:
        constants: The values of its nodes that depend on no input.
        graph: The new graph.
        bytes: What the new graph has as bytes, by the node of the reference graph.
        meta: What new nodes get to know: the user's line.
    """

    def __init__(self, reference: fx.GraphModule) -> None:
        self.reference, self.constants = reference, Constants(reference)
        self.graph = fx.Graph(tracer_cls=Retracer)
        self.bytes: dict[fx.Node, Bytes] = {}
        self.meta: dict[str, Any] = {}
        self._values: dict[fx.Node, fx.Node] = {}
        self._owned: dict[str, Any] = {}  # modules by provisional names, and tensors
        self._names: dict[str, str] = {}
        self._copied: dict[str, str] = {}

    def value(self, node: fx.Node) -> fx.Node:
        """Returns what the new graph has for a node of the reference graph, with floats for bytes."""
        if node not in self._values:
            integers = self.bytes[node]
            dequantize = Dequantize(integers.qparams)
            self._values[node] = self.call(f"{integers.node.name}_dequantize", dequantize, integers.node)
        return self._values[node]

    def set_value(self, node: fx.Node, value: fx.Node) -> None:
        """Says what the new graph has for a node of the reference graph."""
        self._values[node] = value

    def call(self, name: str, module: nn.Module, *args: Any) -> fx.Node:
        """Writes a call of a new module, which gets this name unless another has it."""
        target = self._own(name, module)
        made = self.graph.create_node("call_module", target, args, name=name.replace(".", "_"))
        made.meta = dict(self.meta)
        return made

    def copy(self, node: fx.Node, of_bytes: bool = False) -> fx.Node:
        """Writes a node of the reference graph as it is.

        Args:
            node: The node.
            of_bytes: Whether it reads bytes where there are some.
        """

        def read(source: fx.Node) -> fx.Node:
            return self.bytes[source].node if of_bytes and source in self.bytes else self.value(source)

        copied = self.graph.node_copy(node, read)
        if node.op == "call_module":
            name = str(node.target)  # one module, however often it is called
            if name not in self._copied:
                self._copied[name] = self._own(name, self.reference.get_submodule(name))
            copied.target = self._copied[name]
        elif node.op == "get_attr":
            self._owned[str(node.target)] = _attribute(self.reference, str(node.target))
        return copied

    def finish(self, name: str) -> fx.GraphModule:
        """Returns the graph as a module, without what nothing reads."""
        graph = fx.GraphModule(self._owned, self.graph).graph
        graph.eliminate_dead_code()
        owned = dict(self._owned)
        final: dict[str, str] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                provisional = str(node.target)
                if provisional not in final:
                    final[provisional] = _free(self._names[provisional], owned)
                    owned[final[provisional]] = self._owned[provisional]
                node.target = final[provisional]
        made = fx.GraphModule(owned, graph, name).eval()
        for buffer in dict(made.named_buffers()).keys() & self._unsaved():
            parent, _, leaf = buffer.rpartition(".")
            value = made.get_buffer(buffer)
            delattr(made.get_submodule(parent), leaf)
            made.get_submodule(parent).register_buffer(leaf, value, persistent=False)
        return made

    def _unsaved(self) -> set[str]:
        """Returns the names of buffers that no state dict of the reference graph has."""
        return dict(self.reference.named_buffers()).keys() - self.reference.state_dict().keys()

    def _own(self, name: str, module: nn.Module) -> str:
        provisional = f"provisional_{len(self._names)}"
        self._owned[provisional], self._names[provisional] = module, name
        return provisional


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """Returns a name that is not taken: a module that is called again is another one in int8."""
    calls, found = 1, name
    while found in taken:
        calls += 1
        found = f"{name}_call_{calls}"
    return found


def _attribute(root: nn.Module, name: str) -> torch.Tensor:
    parent, _, leaf = name.rpartition(".")
    return getattr(root.get_submodule(parent), leaf)


def arguments(node: fx.Node, *names: str | tuple[str, Any]) -> tuple[Any, ...]:
    """Returns the arguments of a call in order; a name may come with a default, which is else None."""
    parameters = [name if isinstance(name, tuple) else (name, None) for name in names]
    given = [*node.args, *[node.kwargs.get(name, default) for name, default in parameters[len(node.args) :]]]
    return tuple(given[: len(names)])
