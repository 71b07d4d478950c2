"""Finds which modules read which outputs, from the graph of a network or of its parts."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Iterator

from torch import fx, nn

from qat_lightning.base import random_state
from qat_lightning.base.subclass import forward_of
from qat_lightning.modes.graph.flow import TRANSPARENT, Flow, attributes, is_leaf
from qat_lightning.modes.trace.one_thread import OneThreadTracer
from qat_lightning.modes.trace.symbolic import defaults


def traced(network: nn.Module, keep_float: tuple[str, ...], prefix: str = "") -> list[Flow]:
    """Returns the flows of `network` in training and in eval mode, from its graphs.

    Raises:
        Exception: Anything that its forward raises when it gets proxies instead of tensors.
    """
    flows = []
    for training in (True, False):
        twin = copy.deepcopy(network).train(training)
        with random_state.preserved():
            graph = _Tracer(keep_float, prefix).trace(twin, concrete_args=defaults(twin))
        stored = {proxy.node for proxy in attributes(twin) if isinstance(proxy, fx.Proxy)}
        flows.append(_flow_of(graph, stored, prefix))
    return flows


def traced_parts(network: nn.Module, keep_float: tuple[str, ...], prefix: str = "") -> Iterator[Flow]:
    """Yields the flows of the outermost parts of `network` that can be traced, each part by itself."""
    for key, child in network.named_children():
        name = prefix + key
        if not is_leaf(child, name, keep_float):
            try:
                _check_called_whole(network, key, child)
                yield from traced(child, keep_float, f"{name}.")
            except Exception:
                yield from traced_parts(child, keep_float, f"{name}.")


def _check_called_whole(parent: nn.Module, key: str, child: nn.Module) -> None:
    """Raises if `child` is a Sequential and the code of `parent` might call its layers one by one."""
    if forward_of(child) is not nn.Sequential.forward or isinstance(parent, TRANSPARENT):
        return
    for kind in type(parent).__mro__[: type(parent).__mro__.index(nn.Module)]:
        nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind)))))
        called = [node.func for node in nodes if isinstance(node, ast.Call)]
        uses = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr == key]
        if any(isinstance(use.ctx, ast.Load) and use not in called for use in uses):
            raise ValueError(f"{kind.__name__} does more with {key!r} than call it")


class _Tracer(OneThreadTracer):
    def __init__(self, keep_float: tuple[str, ...], prefix: str) -> None:
        super().__init__()
        self.keep_float, self.prefix = keep_float, prefix

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m, self.prefix + module_qualified_name, self.keep_float)


def _flow_of(graph: fx.Graph, stored: set[fx.Node], prefix: str) -> Flow:
    """Returns the flow of a graph; `stored` are the nodes whose results the forward left in attributes."""
    flow = Flow()
    for node in graph.nodes:
        if node.op == "call_module":
            flow.calls[prefix + node.target] += 1
            flow.readers[prefix + node.target] = [_reader(user, node, prefix) for user in node.users]
            flow.readers[prefix + node.target] += [None] * (node in stored)
        elif node.op == "get_attr":
            owner, _, _ = node.target.rpartition(".")
            flow.calls[prefix + owner] += 1  # the reader of a weight needs the weight's module unfused
    return flow


def _reader(user: fx.Node, node: fx.Node, prefix: str) -> str | None:
    alone = user.op == "call_module" and user.args == (node,) and not user.kwargs
    return f"{prefix}{user.target}" if alone else None
