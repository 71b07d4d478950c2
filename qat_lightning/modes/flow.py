"""Who reads whose output in a network's forward: from its graph, or from watching it run.

Of two modules that follow each other, the first may be fused with the second only if nobody else reads what
lies between them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from qat_lightning import random_state
from qat_lightning.modes.purity import records_nothing_else
from qat_lightning.modes.relu6 import is_inside
from qat_lightning.modes.tracing import defaults


@dataclass
class Flow:
    """One run of a forward.

    Attributes:
        calls: How often each module was called, by name.
        readers: For each module what read its output: the names of modules, or None for anything else.
    """

    calls: Counter[str] = field(default_factory=Counter)
    readers: dict[str, list[str | None]] = field(default_factory=dict)


def follower(name: str, flows: Sequence[Flow]) -> str | None:
    """The module that alone reads the output of `name`, in every flow that calls one of the two, and once."""
    readers = [flow.readers[name] for flow in flows if flow.calls[name]]
    reader = readers[0][0] if readers and readers[0] else None
    if reader is None or any(others != [reader] for others in readers):
        return None
    once = all(flow.calls[name] == flow.calls[reader] <= 1 for flow in flows)
    return reader if once else None


def traced(network: nn.Module, keep_float: tuple[str, ...], prefix: str = "") -> list[Flow]:
    """The flows of `network` in training and in eval mode, from its graphs.

    Raises:
        Exception: Whatever its forward raises when it gets no tensors but proxies.
    """
    flows = []
    for training in (True, False):
        twin = copy.deepcopy(network).train(training)
        with records_nothing_else(twin):
            graph = _Tracer(keep_float, prefix).trace(twin, concrete_args=defaults(twin))
        flows.append(_flow_of(graph, prefix))
    return flows


def traced_parts(network: nn.Module, keep_float: tuple[str, ...], prefix: str = "") -> Iterator[Flow]:
    """The flows of the outermost parts of `network` that can be traced, each for itself."""
    for key, child in network.named_children():
        name = prefix + key
        if not _is_leaf(child, name, keep_float):
            try:
                yield from traced(child, keep_float, f"{name}.")
            except Exception:
                yield from traced_parts(child, keep_float, f"{name}.")


def watched(network: nn.Module, inputs: tuple[Any, ...], keep_float: tuple[str, ...]) -> list[Flow]:
    """The flows of `network` in eval and in training mode, from running copies of it on `inputs`.

    A forward that needs more in training (targets, say) is watched in eval mode only. Batch-norm stays in
    eval mode, since it would refuse a batch of one.

    Raises:
        ValueError: The network does not run on `inputs`.
    """
    state = random_state.capture()
    try:
        flows = [_watch(network, inputs, keep_float, training=False)]
        with suppress(Exception):
            flows.append(_watch(network, inputs, keep_float, training=True))
    except Exception as error:
        raise ValueError(
            f"{type(network).__name__} cannot be traced, and it does not run on the example inputs either, "
            f"which would show what to fuse: {error} ({type(error).__name__}). example_inputs must be a "
            "tuple of what forward takes."
        ) from error
    finally:
        random_state.restore(state)
    return flows


def _is_leaf(module: nn.Module, name: str, keep_float: tuple[str, ...]) -> bool:
    """Whether what happens inside `module` is its own affair. An Identity is nothing at all."""
    if is_inside(name, keep_float) or isinstance(module, QuantStub | DeQuantStub | torch.jit.ScriptModule):
        return True
    package = type(module).__module__
    return package.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(module, _TRANSPARENT)


_TRANSPARENT = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity)


class _Tracer(fx.Tracer):
    def __init__(self, keep_float: tuple[str, ...], prefix: str) -> None:
        super().__init__()
        self.keep_float, self.prefix = keep_float, prefix

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m, self.prefix + module_qualified_name, self.keep_float)


def _flow_of(graph: fx.Graph, prefix: str) -> Flow:
    flow = Flow()
    for node in graph.nodes:
        if node.op == "call_module":
            flow.calls[prefix + node.target] += 1
            flow.readers[prefix + node.target] = [_reader(user, node, prefix) for user in node.users]
        elif node.op == "get_attr":
            owner, _, _ = node.target.rpartition(".")
            flow.calls[prefix + owner] += 1  # whoever reads a weight needs its owner to stay as it is
    return flow


def _reader(user: fx.Node, node: fx.Node, prefix: str) -> str | None:
    alone = user.op == "call_module" and user.args == (node,) and not user.kwargs
    return f"{prefix}{user.target}" if alone else None


@torch.no_grad()
def _watch(network: nn.Module, inputs: tuple[Any, ...], keep_float: tuple[str, ...], training: bool) -> Flow:
    twin, inputs = copy.deepcopy((network, inputs))
    twin.train(training)
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    watch = _Watch()
    for name, module in twin.named_modules():
        if name and _is_leaf(module, name, keep_float):
            watch.follow(module, name)
    with watch:
        watch.read(twin(*inputs))
    return watch.flow


class _Watch(TorchFunctionMode):
    """Records in a flow what the leaf modules, and the functions between them, read."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = Flow()
        self.depth = 0
        self.makers: dict[
            int, tuple[str, torch.Tensor]
        ] = {}  # holds the tensors, so that no id is used again

    def follow(self, module: nn.Module, name: str) -> None:
        """Watches a leaf module from now on."""

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self.depth == 0:
                self.flow.calls[name] += 1
                alone = len(args) == 1 and not kwargs
                self.read((args, kwargs), name if alone else None)
            self.depth += 1

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            self.depth -= 1
            if self.depth == 0:
                self.flow.readers.setdefault(name, [])
                self.makers |= {id(value): (name, value) for value in _tensors(output)}

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)

    def read(self, values: Any, reader: str | None = None) -> None:
        """Records that `reader`, or anything that is no module, reads the tensors in `values`."""
        for value in _tensors(values):
            if id(value) in self.makers:
                maker, _ = self.makers[id(value)]
                self.flow.readers[maker].append(reader)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.depth == 0:
            self.read((args, kwargs))
        return func(*args, **kwargs)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
