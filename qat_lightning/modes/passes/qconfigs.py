"""Finds the QConfig of each node of a graph: the backend's default, or what a user's mapping says."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import fx

from qat_lightning.modes.graph.functions import node_function
from qat_lightning.modes.graph.nodes import RELUS, call_target, sole_reader
from qat_lightning.modes.graph.relu6 import is_inside
from qat_lightning.modes.passes.declare import declared_rule


class QConfigs:
    """The QConfig of each node of a graph.

    Args:
        graph_module: The traced network, before anything is changed.
        scopes: The name and the class of the module in whose forward each node is, by the node's name.
        mapping: A QConfigMapping.
        keep_float: Names of the modules, and of the functions, that stay float.
        functions: QConfigs of functions, by name. The name of a module goes before that of a function.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        scopes: dict[str, Any],
        mapping: Any,
        keep_float: Collection[str],
        functions: Mapping[str, Any],
    ) -> None:
        self._kinds = {name: type(m) for name, m in graph_module.named_modules(remove_duplicate=False)}
        self._scopes, self._mapping, self._floating = scopes, mapping, tuple(keep_float)
        self._functions = functions
        floating = [node for node in graph_module.graph.nodes if node_function(node) in self._floating]
        self._known: dict[fx.Node, Any] = dict.fromkeys(floating)

    def of(self, node: fx.Node) -> Any:
        """Returns the QConfig of a node; None if it stays float."""
        if node not in self._known:
            self._known[node] = self._resolve(node)
        return self._known[node]

    @property
    def default(self) -> Any:
        """The QConfig of what no rule names."""
        return self._mapping.global_qconfig

    def _resolve(self, node: fx.Node) -> Any:
        is_module = node.op == "call_module"
        path = str(node.target) if is_module else self._scopes.get(node.name, ("", None))[0]
        if is_inside(path, self._floating):
            return None
        mapping = self._mapping
        qconfig = mapping.global_qconfig
        if not is_module:
            qconfig = mapping.object_type_qconfigs.get(node.target, qconfig)
        qconfig = mapping.object_type_qconfigs.get(self._kinds.get(path), qconfig)
        for pattern, value in mapping.module_name_regex_qconfigs.items():
            if re.match(pattern, path):
                qconfig = value
                break
        qconfig = self._functions.get(node_function(node) or "", qconfig)
        return self._by_name(path, qconfig)

    def _by_name(self, path: str, qconfig: Any) -> Any:
        """Returns the QConfig of the innermost module around `path` that a rule names."""
        rules = self._mapping.module_name_qconfigs
        parts = path.split(".")
        names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
        return next((rules[name] for name in names if name in rules), qconfig)


def relu_after(graph_module: fx.GraphModule, node: fx.Node, qconfigs: QConfigs) -> fx.Node | None:
    """Returns the ReLU that alone reads a node's result; None if there is none, or if it stays float."""
    reader = sole_reader(node)
    if reader is None or call_target(graph_module, reader) not in RELUS or declared_rule(reader) is not None:
        return None
    return reader if qconfigs.of(reader) is not None else None
