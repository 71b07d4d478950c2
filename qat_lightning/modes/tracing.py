"""Turns a float network into a `torch.fx` graph that still follows `train()` and `eval()`.

A trace records one run, so whatever `forward` decides by `self.training` is decided once and for
all: a network traced in training mode drops out in eval, too. Here it is traced twice, in training
and in eval mode, and the two graphs are merged into one:

- a call whose literal arguments differ, such as `F.dropout(x, 0.5, True)` and `F.dropout(x, 0.5,
  False)`, becomes a small module that picks its arguments by its own `training` flag;
- outputs that differ (a tuple with auxiliary logits in training, a tensor in eval) are both
  computed, and a last small module returns the one that fits. Conversion keeps the eval one alone.
"""

from __future__ import annotations

import dis
import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.ao.nn.intrinsic import _FusedModule
from torch.ao.nn.quantized import FXFloatFunctional
from torch.ao.quantization.fx.tracer import QuantizationTracer

from qat_lightning.errors import UntraceableError
from qat_lightning.modes.by_mode import ByMode, OutputByMode, by_mode
from qat_lightning.modes.calls import Whole
from qat_lightning.modes.dropout import remove_dropout
from qat_lightning.modes.functional import read_facts_elsewhere, write_out_arguments
from qat_lightning.modes.mutation import read_what_was_written
from qat_lightning.modes.purity import records_nothing_else

QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def reads_training(module: nn.Module) -> bool:
    """Whether the forward of `module`'s class looks at `self.training`."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and any(
        step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval == "training"
        for step in dis.get_instructions(code)
    )


def holds_quantizable(module: nn.Module) -> bool:
    """Whether there is a convolution or a linear layer in `module`, or it is one."""
    return any(isinstance(child, QUANTIZABLE) for child in module.modules())


class _Tracer(QuantizationTracer):  # type: ignore[misc]
    """torch.ao's tracer, with more leaves.

    A module that reads `self.training` and holds nothing to quantize (stochastic depth, drop path)
    stays whole: nothing is lost, and its own flag keeps deciding.
    """

    def __init__(self, whole: Whole) -> None:
        super().__init__([], [])
        self.whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            super().is_leaf_module(m, module_qualified_name)
            or module_qualified_name in self.whole.modules
            or isinstance(m, FXFloatFunctional | _FusedModule)
            or (reads_training(m) and not holds_quantizable(m))
        )


def trace(network: nn.Module) -> tuple[fx.GraphModule, dict[str, Any]]:
    """Traces `network` into a graph that behaves like it in training and in eval mode.

    Args:
        network: A float network. Its modules and parameters are shared with the result.

    Returns:
        The graph module, and the scope (module name and type) of each node, which torch.ao uses to
        find the qconfig of a function call.

    Raises:
        UntraceableError: `torch.fx` cannot trace it, or the two traces cannot be merged; the
            message names the file and the line.
    """
    try:
        return _trace_with(network, Whole())
    except UntraceableError:
        leaves = frozenset(
            name for name, module in network.named_modules() if name and reads_training(module)
        )
        if not leaves:
            raise
        return _trace_with(network, Whole(leaves))


def _trace_with(network: nn.Module, whole: Whole) -> tuple[fx.GraphModule, dict[str, Any]]:
    """Traces with `whole`, and with what turns out not to be traceable, as calls of one node each."""
    tracer = _Tracer(whole)
    try:
        with _mode(network, training=True):
            graph = _trace_once(tracer, network)
        with _mode(network, training=False):
            eval_graph = _trace_once(_Tracer(whole), network)
    except UntraceableError as error:
        more = whole.and_culprit(error.__cause__, network, holds_quantizable)
        if more is None:
            raise
        return _trace_with(network, more)
    scopes = {**tracer.node_name_to_scope, **_Merge(network, graph, eval_graph).run()}
    read_what_was_written(network, graph)
    write_out_arguments(graph)
    read_facts_elsewhere(network, graph)
    return fx.GraphModule(network, graph, type(network).__name__), scopes


@contextmanager
def _mode(network: nn.Module, training: bool) -> Iterator[None]:
    """Puts every module into one mode, and each back into its own afterwards."""
    before = {module: module.training for module in network.modules()}
    for module in before:
        module.training = training
    try:
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


def _trace_once(tracer: _Tracer, network: nn.Module) -> fx.Graph:
    try:
        with records_nothing_else(network), tracer.whole.recorded():
            graph = tracer.trace(network, concrete_args=_defaults(network))
    except Exception as error:
        where = _users_line(error, network)
        raise UntraceableError(
            f"torch.fx cannot trace {type(network).__name__}: {error}\n"
            f"  at {where}\n"
            "A graph needs a forward whose path does not depend on the values of tensors, on random numbers "
            "or on earlier calls. Either rewrite that line, or keep the part float and quantize the rest "
            "(modules=[…] names the submodules to quantize), or give the network QuantStubs and use "
            "mode='eager'."
        ) from error
    names = list(inspect.signature(network.forward).parameters)
    for node, name in zip((n for n in graph.nodes if n.op == "placeholder"), names, strict=False):
        if node.target.lstrip("*").startswith(f"{name}_"):
            node.target = name  # a specialized argument keeps its name, so that it can be passed by it
    return graph


def _defaults(network: nn.Module) -> dict[str, Any] | None:
    """The optional arguments of `forward` that decide paths: a graph has the path of the default.

    Passing another value to the graph raises, instead of silently taking the wrong path.
    """
    parameters = inspect.signature(network.forward).parameters.values()
    kinds = (type(None), bool, int, float, str)
    return {p.name: p.default for p in parameters if type(p.default) in kinds} or None


def _users_line(error: BaseException, network: nn.Module) -> str:
    """The last frame of the traceback outside PyTorch: the line that the user can change."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in frame.filename.replace("\\", "/") and frame.filename != __file__
    ]
    if not frames:
        return f"{inspect.getsourcefile(type(network))}"
    frame = frames[-1]
    return f"{frame.filename}:{frame.lineno}: {frame.line}"


class _Merge:
    """Merges the eval graph of a network into its training graph, in place."""

    def __init__(self, network: nn.Module, graph: fx.Graph, evaluate: fx.Graph) -> None:
        self.network, self.graph, self.evaluate = network, graph, evaluate
        self.twin: dict[fx.Node, fx.Node] = {}
        self.scopes: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """Does it, and returns the scopes of the nodes it made."""
        remaining = list(self.graph.nodes)
        unmatched = []
        for node in self.evaluate.nodes:
            if node.op == "output":
                continue
            match = next((i for i, n in enumerate(remaining) if self._same_call(node, n)), None)
            if match is None:
                unmatched.append(node)
                self._copy(node)
            else:
                self.twin[node] = remaining[match]
                del remaining[: match + 1]
        self._choose_arguments()
        self._choose_output()
        self.graph.lint()
        return self.scopes

    def _same_call(self, evaluate: fx.Node, train: fx.Node) -> bool:
        if evaluate.op != train.op or not self._same_target(evaluate, train):
            return False
        inputs = [self.twin.get(node) for node in evaluate.all_input_nodes]
        return inputs == train.all_input_nodes and (
            evaluate.op not in ("placeholder", "get_attr", "call_module")
            or self._arguments(evaluate) == (train.args, train.kwargs)
        )

    def _same_target(self, evaluate: fx.Node, train: fx.Node) -> bool:
        if evaluate.op != "get_attr" or not str(evaluate.target).startswith("_tensor_constant"):
            return evaluate.target == train.target
        constant: Any = getattr(self.network, str(evaluate.target))
        other = getattr(self.network, str(train.target), None)
        return isinstance(other, torch.Tensor) and torch.equal(constant, other)

    def _arguments(self, evaluate: fx.Node) -> tuple[Any, Any]:
        """The arguments of an eval node, in terms of the training graph's nodes."""
        return (
            fx.node.map_arg(evaluate.args, self.twin.__getitem__),
            fx.node.map_arg(evaluate.kwargs, self.twin.__getitem__),
        )

    def _copy(self, node: fx.Node) -> None:
        """Brings a node that only eval mode has into the training graph, just before the output."""
        if node.op == "call_module" and _keeps_state(self.network.get_submodule(str(node.target))):
            raise UntraceableError(
                f"{type(self.network).__name__} calls its layer {node.target!r} in eval mode in a way "
                f"that training mode does not, at {_stack_line(node)}. One graph cannot do both: make "
                "the call the same in both modes, or name the submodules to quantize (modules=[…])."
            )
        with self.graph.inserting_before(next(iter(reversed(self.graph.nodes)))):
            self.twin[node] = self.graph.node_copy(node, self.twin.__getitem__)
            self.scopes[self.twin[node].name] = ("", type(None))

    def _choose_arguments(self) -> None:
        for evaluate, train in self.twin.items():
            arguments = self._arguments(evaluate)
            if train.op in ("call_function", "call_method") and arguments != (
                train.args,
                train.kwargs,
            ):
                self._replace(train, by_mode(train, *arguments))

    def _replace(self, node: fx.Node, module: nn.Module) -> None:
        name = f"{node.name}_by_mode"
        self.network.add_module(name, module)
        with self.graph.inserting_before(node):
            tensors = tuple(node.all_input_nodes) if isinstance(module, ByMode) else node.args[:1]
            new = self.graph.call_module(name, tensors)
        new.meta = dict(node.meta)
        self.scopes[new.name] = (name, type(module))
        node.replace_all_uses_with(new)
        for evaluate, train in self.twin.items():
            if train is node:
                self.twin[evaluate] = new
        self.graph.erase_node(node)

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


def evaluate_only(graph_module: fx.GraphModule) -> None:
    """Leaves in a prepared graph, in place, what eval mode runs: for conversion and export."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and isinstance(
            graph_module.get_submodule(str(node.target)), OutputByMode
        ):
            node.replace_all_uses_with(node.args[1])
            graph_module.graph.erase_node(node)
    remove_dropout(graph_module)
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def _keeps_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _stack_line(node: fx.Node) -> str:
    lines = [line.strip() for line in (node.stack_trace or "").splitlines() if "File " in line]
    users = [line for line in lines if "/torch/" not in line.replace("\\", "/")]
    return users[-1] if users else "an unknown line"
