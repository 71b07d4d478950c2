"""Turns a float network into a `torch.fx` graph that still follows `train()` and `eval()`.

A trace records one run, so that each decision that `forward` makes by `self.training` is fixed: a network
traced in training mode would apply dropout in eval mode, too. So the network is traced twice, in training and
in eval mode, and the two graphs are joined into one:

- A call with different literal arguments, such as `F.dropout(x, 0.5, True)` and `F.dropout(x, 0.5, False)`,
  becomes a small module that chooses its arguments by its own `training` flag.
- If the outputs differ (a tuple with auxiliary logits in training, a tensor in eval), the graph computes
  both, and a small module at the end returns the one of the current mode. Conversion keeps only the eval
  output.
"""

from __future__ import annotations

import dis
import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.ao.nn.quantized import FXFloatFunctional
from torch.ao.quantization.fx.tracer import QuantizationTracer

from qat_lightning.base import random_state
from qat_lightning.base.errors import UntraceableError
from qat_lightning.base.torch_internals import is_traced_constant, modules_of
from qat_lightning.modes.graph.by_mode import OutputByMode
from qat_lightning.modes.graph.constants import wrap_returned_values
from qat_lightning.modes.graph.dropout import remove_dropout
from qat_lightning.modes.graph.guards import remove_guards
from qat_lightning.modes.graph.identities import erase_identities
from qat_lightning.modes.graph.lines import user_frame
from qat_lightning.modes.graph.mutation import redirect_later_reads
from qat_lightning.modes.graph.subclass import forward_of
from qat_lightning.modes.torch_ao_internals import FusedModule
from qat_lightning.modes.trace.calls import Opaque
from qat_lightning.modes.trace.contexts import AutogradFunction, detach_results, watched_contexts
from qat_lightning.modes.trace.functional import read_metadata_from_buffers, write_out_arguments
from qat_lightning.modes.trace.impure import Impure
from qat_lightning.modes.trace.join_modes import join_modes
from qat_lightning.modes.trace.norm_acts import split_norms
from qat_lightning.modes.trace.one_thread import OneThreadTracer
from qat_lightning.modes.trace.own_layers import call_plain_layers
from qat_lightning.modes.trace.purity import refuse_side_effects
from qat_lightning.modes.trace.transformers import traceable_transformers
from qat_lightning.modes.trace.writes import refuse_recorded_write

QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def reads_training(module: nn.Module) -> bool:
    """Whether the forward of `module`'s class reads `self.training`."""
    code = getattr(forward_of(module), "__code__", None)
    return code is not None and any(
        step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")) and step.argval == "training"
        for step in dis.get_instructions(code)
    )


def same_tensor(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have the same type and values."""
    return left.dtype == right.dtype and left.device == right.device and torch.equal(left, right)


def share_constants(traced: nn.Module, network: nn.Module) -> None:
    """Gives `network` the constants and autograd functions that a trace of its copy `traced` met."""
    for name, value in vars(traced).items():
        if is_traced_constant(name):
            vars(network)[name] = value
    for name, module in traced.named_children():
        if isinstance(module, AutogradFunction) and name not in modules_of(network):
            network.add_module(name, module)


def holds_quantizable(module: nn.Module) -> bool:
    """Whether `module` is or contains a convolution or a linear layer."""
    return any(isinstance(child, QUANTIZABLE) for child in module.modules())


def _is_scripted(module: nn.Module) -> bool:
    """Whether `module` is a TorchScript module with weights, which cannot be traced."""
    return isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None


def _holds_layers(module: nn.Module) -> bool:
    return holds_quantizable(module) or any(_is_scripted(child) for child in module.modules())


class NetworkTracer(OneThreadTracer, QuantizationTracer):  # type: ignore[misc]
    """torch.ao's tracer, with more leaves.

    A module that reads `self.training` and holds nothing to quantize (stochastic depth, drop path) becomes a
    single call. Nothing is lost, and its own flag keeps deciding.

    Attributes:
        advice: What to do about a network that this tracer cannot record.
    """

    advice = (
        "A graph needs a forward whose path does not depend on the values of tensors, on random numbers "
        "or on earlier calls. Either rewrite that line, or pass an example of the call, which decides the "
        "path (example_inputs=…, or the LightningModule's example_input_array), or keep the part float and "
        "quantize the rest (untraceable='float', or modules=[…] with the submodules to quantize), or give "
        "the network QuantStubs and use mode='eager'."
    )

    def __init__(self, opaque: Opaque) -> None:
        super().__init__([], [])
        self.opaque = opaque
        self.failed: tuple[Exception | None, str] = None, ""
        self.drew = ""
        self._detached: dict[fx.Node, fx.Node] = {}

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None
    ) -> fx.Node:
        """Makes a node; what `torch.no_grad()` computed is detached where a node outside of it reads it."""
        records = torch.is_grad_enabled()
        if records:
            args, kwargs = detach_results(super().create_node, self._detached, (args, kwargs))
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["no_grad"] = not records and kind.startswith("call_")
        return node

    def create_arg(self, a: Any) -> Any:
        """Gives a constant tensor the name of an equal one from an earlier trace, so that graphs agree."""
        if isinstance(a, torch.Tensor) and a not in self.tensor_attrs:
            for name, value in vars(self.root).items():
                if is_traced_constant(name) and same_tensor(a, value):
                    self.tensor_attrs[a] = name
        return super().create_arg(a)

    def record_call(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Calls `m`, and remembers the innermost module that fails or draws random numbers."""
        before = random_state.capture()
        try:
            result = super().record_call(m, forward, args, kwargs)
        except Exception as error:
            if error is not self.failed[0]:
                self.failed = error, self.path_of_module(m)
            raise
        if not self.drew and not random_state.same_state(before, random_state.capture()):
            self.drew = self.path_of_module(m)
        return result

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            super().is_leaf_module(m, module_qualified_name)
            or module_qualified_name in self.opaque.modules
            or isinstance(m, FXFloatFunctional | FusedModule | AutogradFunction | torch.jit.ScriptModule)
            or (reads_training(m) and not holds_quantizable(m))
        )


class _SymbolicTracer(NetworkTracer):
    """Records a forward without values. It refuses what only values would show to be harmless."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Records a node, unless it writes into a tensor of the network."""
        node = super().create_node(*args, **kwargs)
        refuse_recorded_write(node)
        return node

    def record_call(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Calls `m`, unless it is a TorchScript module with weights, which would stay float unnoticed."""
        if _is_scripted(m) and self.path_of_module(m) not in self.opaque.modules:
            error = TypeError("it calls a TorchScript module, which has no Python code to trace")
            self.failed = error, self.path_of_module(m)
            raise error
        return super().record_call(m, forward, args, kwargs)


Record = Callable[[nn.Module, Opaque], tuple[NetworkTracer, fx.Graph, fx.Graph]]
"""Records a network's forward: returns a tracer, the graph of training mode, and that of eval mode."""


def record_symbolically(network: nn.Module, opaque: Opaque) -> tuple[NetworkTracer, fx.Graph, fx.Graph]:
    """Records a network without an example, where its path depends on nothing but its mode."""
    tracer = _SymbolicTracer(opaque)
    with _mode(network, training=True):
        graph = _trace_once(tracer, network)
    with _mode(network, training=False):
        return tracer, graph, _trace_once(_SymbolicTracer(opaque), network)


def trace(network: nn.Module, record: Record = record_symbolically) -> tuple[fx.GraphModule, dict[str, Any]]:
    """Traces `network` into a graph that behaves like it in training and in eval mode.

    Args:
        network: A float network. Its modules and parameters are shared with the result.
        record: How to record its forward.

    Returns:
        The graph module, and the scope (module name and type) of each node, which torch.ao uses to
        find the qconfig of a function call.

    Raises:
        UntraceableError: `torch.fx` cannot trace it, or the two graphs cannot be joined. The message names
            the file and the line.
    """
    try:
        return trace_with(network, Opaque(), record)
    except UntraceableError:
        leaves = frozenset(
            name for name, module in network.named_modules() if name and reads_training(module)
        )
        if not leaves:
            raise
        return trace_with(network, Opaque(leaves), record)


def trace_with(
    network: nn.Module, opaque: Opaque, record: Record = record_symbolically
) -> tuple[fx.GraphModule, dict[str, Any]]:
    """Traces like :func:`trace`, with a single call for each part in `opaque` and each untraceable part."""
    with split_norms(network):
        return _trace_split(network, opaque, record)


def _trace_split(network: nn.Module, opaque: Opaque, record: Record) -> tuple[fx.GraphModule, dict[str, Any]]:
    try:
        with traceable_transformers(network):
            tracer, graph, eval_graph = record(network, opaque)
    except UntraceableError as error:
        more = opaque.with_culprit(error.__cause__, network, _holds_layers)
        if more is None:
            raise
        return _trace_split(network, more, record)
    scopes = {**tracer.node_name_to_scope, **join_modes(network, graph, eval_graph)}
    scopes |= wrap_returned_values(graph)
    erase_identities(network, graph)
    redirect_later_reads(network, graph)
    write_out_arguments(graph)
    plain = call_plain_layers(network, graph)
    read_metadata_from_buffers(network, graph)
    graph_module = fx.GraphModule(network, graph, type(network).__name__)
    for name, layer in plain.items():
        graph_module.set_submodule(name, layer)
    return graph_module, scopes


@contextmanager
def _mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Puts all modules into one mode, and restores the mode of each afterwards."""
    before = {module: module.training for module in network.modules()}
    for module in before:
        module.training = training
    try:
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


def _trace_once(tracer: NetworkTracer, network: nn.Module) -> fx.Graph:
    try:
        with refuse_side_effects(network), tracer.opaque.recorded(), watched_contexts(tracer):
            graph = tracer.trace(network, concrete_args=defaults(network))
    except Exception as error:
        raise untraceable_error(network, tracer, error) from error
    names = list(inspect.signature(network.forward).parameters)
    for node, name in zip((n for n in graph.nodes if n.op == "placeholder"), names, strict=False):
        if node.target.lstrip("*").startswith(f"{name}_"):
            node.target = name  # keeps a specialized argument passable by name
    return graph


def untraceable_error(network: nn.Module, tracer: NetworkTracer, error: Exception) -> UntraceableError:
    """Returns the error that says why `tracer` could not record `network`, and where."""
    frame = user_frame(error)
    where = inspect.getsourcefile(type(network)) if frame is None else _line(frame, frame.filename)
    return UntraceableError(
        f"torch.fx cannot trace {type(network).__name__}: {error}\n  at {where}\n{tracer.advice}",
        _part(error, tracer),
        "" if frame is None else _line(frame, Path(frame.filename).name),
    )


def defaults(network: nn.Module) -> dict[str, Any] | None:
    """Returns the optional arguments of `forward` that may decide its path: a graph follows their defaults.

    Passing another value to the graph raises, instead of silently taking the wrong path.
    """
    parameters = inspect.signature(network.forward).parameters.values()
    kinds = (type(None), bool, int, float, str)
    return {p.name: p.default for p in parameters if type(p.default) in kinds} or None


def _part(error: Exception, tracer: NetworkTracer) -> str:
    """Returns the name of the innermost module that caused an error of a trace."""
    if error is tracer.failed[0] or not isinstance(error, Impure):
        return tracer.failed[1] if error is tracer.failed[0] else ""
    names = (name for name, module in tracer.root.named_modules() if module is error.module)
    return next(names, tracer.drew)


def _line(frame: traceback.FrameSummary, file: str) -> str:
    return f"{file}:{frame.lineno}: {frame.line}"


def evaluate_only(graph_module: fx.GraphModule) -> None:
    """Reduces a prepared graph to what eval mode runs, in place, for conversion and export."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and isinstance(
            graph_module.get_submodule(str(node.target)), OutputByMode
        ):
            node.replace_all_uses_with(node.args[1])
            graph_module.graph.erase_node(node)
    remove_dropout(graph_module)
    remove_guards(graph_module, of_training=True)
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
