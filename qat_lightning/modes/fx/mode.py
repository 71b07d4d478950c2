"""FX graph mode: traces the network, so that fusions, additions and functional calls are found in its graph.

torch.ao's `prepare_qat_fx` runs its own tracer, `fuse` and `prepare`. Here `fuse` and `prepare` follow this
package's trace, which keeps the differences between training and eval mode.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

from torch import fx, nn

from qat_lightning.base.backends import runs_on_plain_tensors
from qat_lightning.base.errors import UntraceableError
from qat_lightning.base.inputs import Inputs, device_of
from qat_lightning.base.nested import map_tensors
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from qat_lightning.modes.base import ModeResult, Options
from qat_lightning.modes.capture.capture import capturing
from qat_lightning.modes.fx.integers import drop_unseen
from qat_lightning.modes.fx.row_layers import RowLayers
from qat_lightning.modes.graph import behaviour, graft
from qat_lightning.modes.graph.functions import called_functions
from qat_lightning.modes.graph.nodes import called_modules
from qat_lightning.modes.graph.quantizable import QUANTIZABLE, holds_quantizable
from qat_lightning.modes.graph.relu6 import is_inside, replace_relu6_in_graph
from qat_lightning.modes.layers.in_place import restore_relus, round_in_place
from qat_lightning.modes.layers.input_qparams import connect_inputs
from qat_lightning.modes.lowering.lower import lower
from qat_lightning.modes.lowering.reference import reference_with_guards
from qat_lightning.modes.passes.annotate import annotate
from qat_lightning.modes.passes.declare import declare
from qat_lightning.modes.passes.decompose_attention import decompose_attention
from qat_lightning.modes.passes.decompose_silu import decompose_silu
from qat_lightning.modes.passes.embeddings import expose_weights
from qat_lightning.modes.passes.fuse import fuse
from qat_lightning.modes.passes.fuse_norms import fuse_norms
from qat_lightning.modes.passes.insert import insert
from qat_lightning.modes.passes.qconfigs import QConfigs
from qat_lightning.modes.purity.hooks import check_hooks
from qat_lightning.modes.purity.structure import structural_copy
from qat_lightning.modes.qconfig import override_qconfig, qconfig_mapping
from qat_lightning.modes.targets import target_of
from qat_lightning.modes.targets.rules import Target
from qat_lightning.modes.trace.calls import Opaque
from qat_lightning.modes.trace.fixed_norms import recognize_fixed_norms
from qat_lightning.modes.trace.functional import write_out_padding
from qat_lightning.modes.trace.symbolic import is_scripted, record_symbolically
from qat_lightning.modes.trace.tracing import Record, evaluate_only, trace
from qat_lightning.modes.trace.untraceable import trace_around

_NAME = "_network_name"  # a deep copy of a graph module loses the name of its class


class FxMode:
    """`prepare_qat_fx` and `convert_fx`, on a trace that keeps the network's behaviour."""

    name = "fx"

    def check(self, network: nn.Module, options: Options) -> Options:
        """Raises if `fuse` lists groups, or if the network has hooks or no `forward` to trace."""
        if options.fuse != "auto":
            raise ValueError(
                "In fx mode fusions are found in the graph, so fuse must be 'auto', but received "
                f"{options.fuse!r}. Leave it out, or use mode='eager'."
            )
        if graft.must_stay_in_place(network):
            _check_own_forward(network)
        check_hooks(network)
        return options

    def functions(
        self, network: nn.Module, untraceable: str, example: Inputs | None, declared: frozenset[str]
    ) -> frozenset[str]:
        """Returns the names of the functions that the graph of `network` calls, and of layers for them."""
        names = [name for name, _ in network.named_modules()]
        traced = _trace(structural_copy(network), untraceable, example, _whole(network, names, declared))
        return called_functions(traced.graph_module.graph)

    def prepares_in_place(self, network: nn.Module) -> bool:
        """Returns whether `network` must stay the same object, as a LightningModule does."""
        return graft.must_stay_in_place(network)

    def prepare(self, network: nn.Module, options: Options) -> ModeResult:
        """Traces, fuses and prepares. The result is `network` itself, or shares its parameters.

        Raises:
            UntraceableError: `torch.fx` cannot trace the network.
        """
        kept = behaviour.attributes(network)
        whole = _whole(network, options.keep_float, options.operations)
        graph_module, scopes, untraceable, captured = _trace(
            network, options.untraceable, options.example_inputs, whole
        )
        declare(graph_module, {n: v for n, v in options.operations.items() if not _is_kept(n, options)})
        expose_weights(graph_module, scopes)
        options = replace(options, keep_float=(*options.keep_float, *untraceable))
        kept |= behaviour.unused_state(network, graph_module)
        used = graft.targets(graph_module.graph)
        own = graft.must_stay_in_place(network)
        qconfigs = _qconfigs(graph_module, scopes, options)
        relu6 = 0
        if options.replace_relu6:
            relu6 = replace_relu6_in_graph(graph_module, scopes, options.keep_float)
        prepared = _prepare(graph_module, qconfigs, target_of(options.backend))
        for _, fake_quantize in fake_quantizes(prepared):
            fake_quantize.like_onednn = runs_on_plain_tensors(options.backend)
        if own:
            graft.graft(network, prepared, used)
        else:
            network = _finish(prepared, kept, type(network).__name__)
        kept_float = tuple(f"{name} ({line})" for name, line in untraceable.items())
        return ModeResult(network, kept_float, relu6, captured)

    def convert(self, prepared: nn.Module, unseen: Collection[str], lowering: str) -> nn.Module:
        """Converts a prepared graph into an int8 one, which runs only what eval mode runs."""
        if graft.is_grafted(prepared):
            graft.regraft(prepared, _int8(graft.ungraft(prepared), unseen, lowering))
            return prepared
        assert isinstance(prepared, fx.GraphModule)
        kept = behaviour.attached(prepared)
        return _finish(_int8(prepared, unseen, lowering), kept, kept[_NAME])


def _qconfigs(graph_module: fx.GraphModule, scopes: dict[str, Any], options: Options) -> QConfigs:
    """Returns the QConfig of each node of a traced network."""
    floating = [*options.keep_float, *_whole_modules(graph_module), *write_out_padding(graph_module)]
    mapping = qconfig_mapping(options.backend, options.qconfig)
    functions: dict[str, Any] = {}
    for name, value in options.overrides.items():
        rules = functions if name.endswith("()") else mapping.module_name_qconfigs
        rules[name] = override_qconfig(value)
    return QConfigs(graph_module, scopes, mapping, floating, functions)


def _prepare(graph_module: fx.GraphModule, qconfigs: QConfigs, target: Target) -> fx.GraphModule:
    """Runs the passes over a graph."""
    rows = RowLayers(graph_module)
    fuse(graph_module, qconfigs, target)
    fuse_norms(graph_module, qconfigs, as_layers=target.norms_are_layers)
    if target.decomposes_attention:
        decompose_attention(graph_module, qconfigs)
    if target.decomposes_silu:
        decompose_silu(graph_module, qconfigs)
    prepared = insert(graph_module, annotate(graph_module, target, qconfigs))
    rows.take_back(prepared)
    round_in_place(prepared)
    connect_inputs(prepared, prepared.graph)
    _place_on_device(prepared)
    return prepared


class _Traced(NamedTuple):
    """A network's graph, the scopes of its nodes, the parts that stay float, and the captured example."""

    graph_module: fx.GraphModule
    scopes: dict[str, Any]
    untraceable: dict[str, str]
    captured: Inputs | None = None


def _is_kept(name: str, options: Options) -> bool:
    return is_inside(name, options.keep_float)


def _whole(network: nn.Module, keep_float: Collection[str], declared: Collection[str]) -> Opaque:
    """Returns what becomes a single call: TorchScript modules in `keep_float`, and declared operations."""
    scripted = frozenset(n for n, m in network.named_modules() if n in keep_float and is_scripted(m))
    return Opaque(scripted) | Opaque.named(declared, network)


def _trace(network: nn.Module, untraceable: str, example: Inputs | None, whole: Opaque) -> _Traced:
    """Captures the network's call with an example; without one, or where that fails, traces symbolically."""
    recognize_fixed_norms(network)
    if example is None:
        return _traced(network, untraceable, record_symbolically, whole)
    try:
        captured = _traced(network, untraceable, capturing(_on_device_of(network, example)), whole)
        return captured._replace(captured=example)
    except UntraceableError as error:
        try:
            return _traced(network, untraceable, record_symbolically, whole)
        except UntraceableError:
            raise error from error.__cause__


def _traced(network: nn.Module, untraceable: str, record: Record, whole: Opaque) -> _Traced:
    if untraceable == "float":
        return _Traced(*trace_around(network, record, whole))
    return _Traced(*trace(network, record, whole), {})


def _on_device_of(network: nn.Module, example: Inputs) -> Inputs:
    device = device_of(network)
    return type(example)(*map_tensors(tuple(example), lambda tensor: tensor.to(device)))


def _check_own_forward(network: nn.Module) -> None:
    if type(network).forward.__module__.startswith(("torch.", "lightning.", "pytorch_lightning.")):
        raise ValueError(
            f"{type(network).__name__} has layers of its own and no `forward` that calls them, so there is "
            "nothing to trace. Write a `forward` and call self(x) in the steps, or put the layers into a "
            "network of their own:\n"
            "    self.model = nn.Sequential(…)   # in __init__\n"
            "    y = self.model(x)               # in the steps"
        )


def _int8(prepared: fx.GraphModule, unseen: Collection[str], lowering: str) -> fx.GraphModule:
    """Converts a prepared graph, and consumes it."""
    evaluate_only(prepared)
    drop_unseen(prepared, unseen)
    if lowering == "plain":
        return lower(reference_with_guards(prepared))
    from qat_lightning.modes.native.lower import lower as lower_natively

    restore_relus(prepared)
    return lower_natively(prepared)


def _whole_modules(graph_module: fx.GraphModule) -> list[str]:
    """Returns the names of modules that the graph calls as a whole: layers inside them stay float."""
    return [
        name
        for name, module in called_modules(graph_module).items()
        if not isinstance(module, QUANTIZABLE) and holds_quantizable(module)
    ]


def _finish(graph_module: fx.GraphModule, kept: dict[str, Any], name: str) -> fx.GraphModule:
    behaviour.attach(graph_module, {**kept, _NAME: name})
    behaviour.mark_containers(graph_module, name)
    type(graph_module).__name__ = name  # each graph module has a class of its own
    return graph_module


def _place_on_device(prepared: nn.Module) -> None:
    """Moves the new fake-quantizes to the device of the network's parameters."""
    parameter = next(prepared.parameters(), None)
    if parameter is not None and parameter.device.type != "meta":
        prepared.to(parameter.device)
