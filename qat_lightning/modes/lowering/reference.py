"""The reference graph: a float copy of a prepared network, with a quantize/dequantize pair at each rounding.

It works for both modes, since both keep fake-quantizes and fused layers as modules. Each fake-quantize
becomes a quantize/dequantize pair of `torch.ops.qat_lightning`. Each fused layer becomes a plain one
with batch-norm folded in and its weight stored as int8.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.base.quiet import quiet_torch_ao
from qat_lightning.base.torch_internals import forward_hooks
from qat_lightning.fake_quant.fake_quantize import FakeQuantize
from qat_lightning.fake_quant.ranges import has_range, has_seen_data
from qat_lightning.fake_quant.switches import is_fake_quantize
from qat_lightning.modes.graph.constants import Constants
from qat_lightning.modes.graph.graft import is_grafted, regraft, ungraft
from qat_lightning.modes.graph.guards import remove_guards
from qat_lightning.modes.graph.nodes import call_target, fake_quantize_of
from qat_lightning.modes.layers.trained_layer import TrainedLayer
from qat_lightning.modes.lowering.int8.weights import computed
from qat_lightning.modes.lowering.operations import OPERATIONS as OPS
from qat_lightning.modes.lowering.rows import hold_rows
from qat_lightning.modes.lowering.spell_out import spell_out
from qat_lightning.modes.lowering.unseen_weights import observe, observe_weights
from qat_lightning.modes.targets.common import COMMON
from qat_lightning.modes.targets.rules import Kind
from qat_lightning.modes.trace.own_layers import with_own_parameters
from qat_lightning.modes.trace.tracing import evaluate_only

_SHARE_QPARAMS = (Kind.MOVES, Kind.AVERAGES, Kind.CONCATENATES)


class QuantizeDequantize(nn.Module):
    """Rounding with fixed qparams, as two operations that an exporter can see.

    Args:
        fake_quantize: Provides the qparams, per-tensor or per-channel.
        scales: The axis of per-channel qparams, and how often each index of it repeats; by default the axis
            of the fake-quantize.
    """

    def __init__(self, fake_quantize: Any, scales: tuple[int, int] | None = None) -> None:
        super().__init__()
        scale, zero_point = fake_quantize.calculate_qparams()
        self.axis: int | None = None
        if scale.numel() > 1:
            self.axis, repeats = scales or (int(fake_quantize.ch_axis), 1)
            scale, zero_point = (each.repeat_interleave(repeats) for each in (scale, zero_point))
        self.symmetric = fake_quantize.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
        self.bounds = _bounds(fake_quantize)
        self.dtype = torch.int8 if self.bounds[0] < 0 else torch.uint8
        if self.axis is None:
            self.scale, self.zero_point = float(scale), int(zero_point)
        else:
            self.register_buffer("scale", scale.detach().float())
            self.register_buffer("zero_point", zero_point.detach().to(torch.int32))

    def forward(self, x: torch.Tensor, averaged: bool = False) -> torch.Tensor:
        """Returns the rounded tensor; `averaged` is a message to a lowering, see `FakeQuantize.forward`."""
        return self.dequantize(self.quantize(x))

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the integers of a float tensor."""
        quantize = OPS.quantize_per_tensor if self.axis is None else OPS.quantize_per_channel
        return quantize(x, *self._qparams())

    def dequantize(self, integers: torch.Tensor) -> torch.Tensor:
        """Returns the floats that the integers represent."""
        dequantize = OPS.dequantize_per_tensor if self.axis is None else OPS.dequantize_per_channel
        return dequantize(integers, *self._qparams())

    def _qparams(self) -> tuple[Any, ...]:
        axis = () if self.axis is None else (self.axis,)
        return self.scale, self.zero_point, *axis, *self.bounds, self.dtype


class Unrounded(nn.Identity):
    """Stands for a fake-quantize that rounds nothing."""

    def forward(self, x: torch.Tensor, averaged: bool = False) -> torch.Tensor:
        """Returns the tensor as it is."""
        return x


class ReferenceWeight(QuantizeDequantize):
    """A weight that is stored as int8 and dequantized where it is used.

    Args:
        fake_quantize: Provides the qparams of the weight.
        weight: The weight in float32.
        scales: As in :class:`QuantizeDequantize`.
    """

    def __init__(
        self, fake_quantize: Any, weight: torch.Tensor, scales: tuple[int, int] | None = None
    ) -> None:
        super().__init__(fake_quantize, scales)
        self.register_buffer("int8", self.quantize(weight.detach().float()))

    def forward(self, x: torch.Tensor | None = None, averaged: bool = False) -> torch.Tensor:
        """Returns the rounded weight; ignores the float one that a graph passes to be rounded."""
        integers: Any = self.int8
        return self.dequantize(integers)


class ReferenceLayer(nn.Module):
    """A convolution or linear layer with a :class:`ReferenceWeight`.

    Args:
        layer: The float layer, with batch-norm folded in.
        fake_quantize: Provides the qparams of its weight.
        relu: Whether a ReLU is fused into it.
        scales: As in :class:`QuantizeDequantize`, for the weight.
    """

    def __init__(
        self, layer: Any, fake_quantize: Any, relu: bool, scales: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.layer, self.relu = layer, relu
        self.weight = ReferenceWeight(fake_quantize, layer.weight, scales)
        del layer.weight

    def forward(self, x: torch.Tensor, *size: Any) -> torch.Tensor:
        return computed(self.layer, x, self.weight(), self.relu, *size)


def _bounds(fake_quantize: Any) -> tuple[int, int]:
    """Returns the smallest and the largest integer of a fake-quantize."""
    if isinstance(fake_quantize, FakeQuantize):
        return fake_quantize.bounds
    observer = fake_quantize.activation_post_process
    return int(observer.quant_min), int(observer.quant_max)


def reference(prepared: nn.Module) -> nn.Module:
    """Makes the reference graph of a prepared network from a copy, in eval mode on the CPU."""
    return _rebuilt(copy.deepcopy(prepared).cpu().eval(), _reference_layer, _quantize_dequantize)


def reference_with_guards(prepared: fx.GraphModule) -> Any:
    """Makes that of a network in eval mode on the CPU, which is consumed; its guards stay.

    Each fake-quantize rounds, whether it has seen data or not.
    """
    observe_weights(prepared)
    return _rebuilt(prepared, _reference_layer, _rounding, guards=True)


def floating(prepared: nn.Module) -> nn.Module:
    """Makes the reference graph without any rounding.

    The result is a float network with the trained weights, batch-norm folded in.
    """
    return _rebuilt(copy.deepcopy(prepared).cpu().eval(), _float_layer, lambda child, weight: Unrounded())


def _rebuilt(
    module: nn.Module,
    layer: Callable[[Any], nn.Module],
    rounding: Callable[[Any, torch.Tensor | None], nn.Module],
    guards: bool = False,
) -> nn.Module:
    with_own_parameters(module)
    weights: dict[tuple[nn.Module, str], torch.Tensor] = {}
    for network in list(module.modules()):
        if isinstance(network, fx.GraphModule):
            _keep_what_a_file_holds(network, guards)
            weights |= {(network, name): weight for name, weight in _rounded_weights(network).items()}
        elif is_grafted(network):
            graph_module = ungraft(network)
            _keep_what_a_file_holds(graph_module, guards)
            weights |= {(network, name): weight for name, weight in _rounded_weights(graph_module).items()}
            regraft(network, graph_module)
    with quiet_torch_ao():  # an eager network may hold fake-quantizes that never run
        _replace_each(module, lambda m: hasattr(m, "weight_fake_quant"), layer)
        for (network, name), weight in weights.items():
            network.set_submodule(name, rounding(network.get_submodule(name), weight))
        _replace_each(module, is_fake_quantize, lambda m: rounding(m, None))
    for network in {network for network, _ in weights}:
        if is_grafted(network):
            graph_module = ungraft(network)
            hold_rows(graph_module, ReferenceWeight)
            regraft(network, graph_module)
        elif isinstance(network, fx.GraphModule):
            hold_rows(network, ReferenceWeight)
    return module


def _keep_what_a_file_holds(graph_module: fx.GraphModule, guards: bool) -> None:
    if not guards:
        remove_guards(graph_module)
    evaluate_only(graph_module)
    spell_out(graph_module)


def _rounded_weights(graph_module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Maps the name of each fake-quantize that rounds a parameter, moved or not, to what it rounds."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if fake_quantize_of(graph_module, node) is not None:
            calls.setdefault(str(node.target), []).append(node.all_input_nodes[0])
    constants = Constants(graph_module)
    return {
        name: constants.of(sources[0])
        for name, sources in calls.items()
        if len(sources) == 1 and _is_moved_parameter(graph_module, sources[0])
    }


def _is_moved_parameter(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a parameter, or one that is only rounded and moved."""
    if node.op == "get_attr":
        return str(node.target) in dict(graph_module.named_parameters(remove_duplicate=False))
    rule = COMMON.get(call_target(graph_module, node))
    moves = rule is not None and rule.kind in _SHARE_QPARAMS
    if len(node.all_input_nodes) != 1 or not (moves or fake_quantize_of(graph_module, node) is not None):
        return False
    return _is_moved_parameter(graph_module, node.all_input_nodes[0])


def _reference_layer(child: Any) -> nn.Module:
    if isinstance(child, TrainedLayer):
        plain, scales = child.to_int8(), child.stored_scales()
        observe(child.weight_fake_quant, lambda: child.rows_of(plain.weight))
        layer = ReferenceLayer(plain, child.weight_fake_quant, relu=child.relu, scales=scales)
    else:  # torch.ao's, in eager mode
        plain = child.to_float()
        fused = isinstance(plain, nn.Sequential)
        layer = ReferenceLayer(plain[0] if fused else plain, child.weight_fake_quant, relu=fused)
    # Eager mode keeps the fake-quantize of a layer's output in a child that a forward hook calls.
    if hasattr(child, "activation_post_process"):
        layer.activation_post_process = child.activation_post_process
        forward_hooks(layer).update(forward_hooks(child))
    return layer.eval()


def _float_layer(child: Any) -> nn.Module:
    plain: nn.Module = child.to_float()
    fused = isinstance(child, TrainedLayer) and child.relu
    return (nn.Sequential(plain, nn.ReLU()) if fused else plain).eval()


def _quantize_dequantize(child: Any, weight: torch.Tensor | None) -> nn.Module:
    if not bool(child.fake_quant_enabled.any()) or (has_range(child) and not has_seen_data(child)):
        return Unrounded()
    return _rounding(child, weight)


def _rounding(child: Any, weight: torch.Tensor | None) -> nn.Module:
    return QuantizeDequantize(child) if weight is None else ReferenceWeight(child, weight)


def _replace_each(
    module: nn.Module, chosen: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]
) -> None:
    """Replaces the chosen modules; a module that is registered twice (a shared observer) stays shared."""
    made: dict[nn.Module, nn.Module] = {}
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if name and chosen(child):
            parent, _, leaf = name.rpartition(".")
            made[child] = made.get(child) or make(child)
            setattr(module.get_submodule(parent), leaf, made[child])
