"""The tracer that all recordings of a network share: its leaves, its constants, and its errors."""

from __future__ import annotations

import dis
import inspect
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.base import random_state
from qat_lightning.base.errors import UntraceableError
from qat_lightning.base.subclass import derives_from, forward_of
from qat_lightning.base.torch_internals import is_traced_constant
from qat_lightning.modes.graph.lines import user_frame
from qat_lightning.modes.graph.quantizable import holds_quantizable
from qat_lightning.modes.purity.impure import Impure
from qat_lightning.modes.trace.calls import Opaque
from qat_lightning.modes.trace.contexts import AutogradFunction, detach_results
from qat_lightning.modes.trace.fixed_norms import FixedNorm
from qat_lightning.modes.trace.one_thread import OneThreadTracer

_LEAVES = (FixedNorm, AutogradFunction, torch.jit.ScriptModule)


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


class NetworkTracer(OneThreadTracer):
    """A tracer with more leaves than torch.fx's.

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
        super().__init__()
        self.record_stack_traces = not fx.config.do_not_emit_stack_traces  # errors name the line
        self.opaque = opaque
        self.failed: tuple[Exception | None, str] = None, ""
        self.drew = ""
        self._constants: set[str] = set()  # the names of those that this trace has met
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
        """Gives a constant tensor the name of an equal one from an earlier trace, so that graphs agree.

        Two constants of one trace have two names, even if they are equal: those that are computed from the
        buffers of a fresh network may be, and those of the trained one not. The names must not tell.
        """
        if not isinstance(a, torch.Tensor) or a in self.tensor_attrs:
            return super().create_arg(a)
        for name, value in vars(self.root).items():
            if is_traced_constant(name) and name not in self._constants and same_tensor(a, value):
                self.tensor_attrs[a] = name
                break
        argument = super().create_arg(a)
        self._constants.add(self.tensor_attrs.get(a, ""))
        return argument

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
            or isinstance(m, _LEAVES)
            or derives_from(m, "torch.ao.nn.intrinsic.")
            or derives_from(m, "torch.ao.nn.", "FXFloatFunctional")
            or (reads_training(m) and not holds_quantizable(m))
        )


def untraceable_error(network: nn.Module, tracer: NetworkTracer, error: Exception) -> UntraceableError:
    """Returns the error that says why `tracer` could not record `network`, and where."""
    frame = user_frame(error)
    where = inspect.getsourcefile(type(network)) if frame is None else _line(frame, frame.filename)
    return UntraceableError(
        f"torch.fx cannot trace {type(network).__name__}: {error}\n  at {where}\n{tracer.advice}",
        _part(error, tracer),
        "" if frame is None else _line(frame, Path(frame.filename).name),
    )


def _part(error: Exception, tracer: NetworkTracer) -> str:
    """Returns the name of the innermost module that caused an error of a trace."""
    if error is tracer.failed[0] or not isinstance(error, Impure):
        return tracer.failed[1] if error is tracer.failed[0] else ""
    names = (name for name, module in tracer.root.named_modules() if module is error.module)
    return next(names, tracer.drew)


def _line(frame: traceback.FrameSummary, file: str) -> str:
    return f"{file}:{frame.lineno}: {frame.line}"
