"""Records what a network does with an example, in training and in eval mode."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn

from qat_lightning.base import random_state
from qat_lightning.base.errors import UntraceableError
from qat_lightning.base.inputs import BatchInputs, Inputs
from qat_lightning.base.torch_internals import is_traced_constant, modules_of
from qat_lightning.modes.capture.caches import empty_caches
from qat_lightning.modes.capture.call import arguments_of_call
from qat_lightning.modes.capture.isolation import isolated_copy
from qat_lightning.modes.capture.state import Stored
from qat_lightning.modes.capture.tracer import CaptureTracer
from qat_lightning.modes.trace.calls import Opaque
from qat_lightning.modes.trace.contexts import AutogradFunction
from qat_lightning.modes.trace.network_tracer import NetworkTracer, untraceable_error
from qat_lightning.modes.trace.tracing import Record


def capturing(example: Inputs) -> Record:
    """Returns a recorder that follows the call of `example`, for `trace`.

    Nothing that the forward does reaches the network: it runs on copies, once in each mode. The values of a
    tensor may decide only if the example was made to decide: those of the next batch are other ones.
    """

    def record(network: nn.Module, opaque: Opaque) -> tuple[NetworkTracer, fx.Graph, fx.Graph]:
        try:
            return _capture_both(network, opaque, example, numbers_flow=True)
        except UntraceableError:  # perhaps of a call that takes plain numbers only
            return _capture_both(network, opaque, example, numbers_flow=False)

    return record


def _capture_both(
    network: nn.Module, opaque: Opaque, example: Inputs, *, numbers_flow: bool
) -> tuple[NetworkTracer, fx.Graph, fx.Graph]:
    """Captures training and eval mode."""

    def tracer() -> CaptureTracer:
        values_decide = not isinstance(example, BatchInputs)
        return CaptureTracer(opaque, values_decide=values_decide, numbers_flow=numbers_flow)

    of_training, of_eval = tracer(), tracer()
    graph = _capture(network, of_training, example, training=True)
    return of_training, graph, _capture(network, of_eval, example, training=False, earlier=of_training.stored)


def _capture(
    network: nn.Module,
    tracer: CaptureTracer,
    example: Inputs,
    *,
    training: bool,
    earlier: Sequence[Stored] = (),
) -> fx.Graph:
    root = isolated_copy(network, training=training)
    try:
        with random_state.preserved(), tracer.opaque.recorded():
            arguments = arguments_of_call(root, example)
            empty_caches(root, arguments)
            graph = tracer.capture(root, arguments, earlier)
    except Exception as error:
        raise untraceable_error(network, tracer, error) from error
    _share_constants(root, network)
    return graph


def _share_constants(traced: nn.Module, network: nn.Module) -> None:
    """Gives `network` the constants and autograd functions that a trace of its copy `traced` met."""
    for name, value in vars(traced).items():
        if is_traced_constant(name):
            vars(network)[name] = value
    for name, module in traced.named_children():
        if isinstance(module, AutogradFunction) and name not in modules_of(network):
            network.add_module(name, module)
