"""FX graph mode: the network is traced, so additions, functional calls and fusions are found by themselves.

`prepare_qat_fx` is its tracer, `fuse` and `prepare` in a row; here the last two follow a trace of
our own, which keeps the difference between training and eval mode.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.fx import fuse, prepare
from torch.ao.quantization.quantize_fx import convert_fx
from torch.nn import functional as F

from qat_lightning import behaviour
from qat_lightning.modes.base import Options
from qat_lightning.modes.conv_bn import use_undivided
from qat_lightning.modes.dropout import keep_grid_through_dropout
from qat_lightning.modes.functional import write_out_padding
from qat_lightning.modes.hooks import check_hooks
from qat_lightning.modes.in_place import restore_relus, round_in_place
from qat_lightning.modes.own_copies import give_each_call_its_own
from qat_lightning.modes.qconfig import qconfig_mapping
from qat_lightning.modes.relu6 import is_inside, is_relu6, replace_relu6_modules
from qat_lightning.modes.tracing import QUANTIZABLE, evaluate_only, holds_quantizable, trace
from qat_lightning.modes.unlowered import keep_unlowered

_NAME = "_network_name"  # a deep copy of a graph module loses the name of its class


class FxMode:
    """`prepare_qat_fx` and `convert_fx`, on a trace that keeps the network's behaviour."""

    name = "fx"

    def check(self, network: nn.Module, options: Options) -> None:
        """Raises if there is an explicit list of fusions, which a graph has no use for."""
        if options.fuse != "auto":
            raise ValueError(
                "In fx mode fusions are found in the graph, so fuse must be 'auto', but received "
                f"{options.fuse!r}. Leave it out, or use mode='eager'."
            )
        if hasattr(network, "training_step"):
            raise ValueError(
                f"In fx mode {type(network).__name__} would become a graph, and no LightningModule any more. "
                "Prepare the network inside it, or give the Trainer the callback QuantizationAwareTraining."
            )
        check_hooks(network)

    def prepare(self, network: nn.Module, options: Options) -> nn.Module:
        """Traces, fuses and prepares; the result shares parameters with `network`.

        Raises:
            UntraceableError: `torch.fx` cannot trace the network.
        """
        kept = behaviour.attributes(network)
        graph_module, scopes = trace(network)
        kept |= behaviour.unused_state(network, graph_module)
        if options.replace_relu6:
            replace_relu6_modules(graph_module, options.keep_float)
            _replace_relu6_calls(graph_module, scopes, options.keep_float)
        mapping = self._mapping(options)
        for name in [*_whole_modules(graph_module), *write_out_padding(graph_module)]:
            mapping.set_module_name(name, None)
        fused = fuse(graph_module, is_qat=True)
        prepared = prepare(fused, mapping, True, scopes, example_inputs=())
        keep_grid_through_dropout(prepared)
        use_undivided(prepared)
        round_in_place(prepared)
        _place_on_device(prepared)
        return _finish(prepared, kept, type(network).__name__)

    def convert(self, prepared: nn.Module) -> nn.Module:
        """Converts a prepared graph module into an int8 one, without what only training runs."""
        assert isinstance(prepared, fx.GraphModule)
        kept = behaviour.attached(prepared)
        evaluate_only(prepared)
        restore_relus(prepared)
        give_each_call_its_own(prepared)
        keep_unlowered(prepared)
        return _finish(convert_fx(prepared), kept, kept[_NAME])

    def _mapping(self, options: Options) -> QConfigMapping:
        mapping = copy.deepcopy(qconfig_mapping(options.backend, options.qconfig))  # the user's stays
        for name in options.keep_float:
            mapping = mapping.set_module_name(name, None)
        return mapping


def _whole_modules(graph_module: fx.GraphModule) -> list[str]:
    """Names of the modules that the graph calls as a whole, whose inner layers stay float with them."""
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    return [
        name
        for name in called
        if not isinstance(graph_module.get_submodule(name), QUANTIZABLE)
        and holds_quantizable(graph_module.get_submodule(name))
    ]


def _finish(graph_module: fx.GraphModule, kept: dict[str, Any], name: str) -> fx.GraphModule:
    behaviour.attach(graph_module, {**kept, _NAME: name})
    behaviour.mark_containers(graph_module, name)
    type(graph_module).__name__ = name  # each graph module has a class of its own
    return graph_module


def _replace_relu6_calls(
    graph_module: fx.GraphModule, scopes: dict[str, Any], keep_float: tuple[str, ...]
) -> None:
    for node in graph_module.graph.nodes:
        if is_relu6(node) and not is_inside(scopes[node.name][0], keep_float):
            node.target, node.args, node.kwargs = F.relu, node.args[:1], {}
    graph_module.recompile()


def _place_on_device(prepared: nn.Module) -> None:
    """Moves the new fake-quantizes to where the network's parameters are."""
    parameter = next(prepared.parameters(), None)
    if parameter is not None and parameter.device.type != "meta":
        prepared.to(parameter.device)
