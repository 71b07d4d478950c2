"""The reference graph: a float copy of a prepared network with quantize/dequantize where it rounds.

Works for every mode, since both keep their fake-quantizes and their fused layers as modules: each
fake-quantize becomes a quantize/dequantize pair of `torch.ops.quantized_decomposed`, and each fused layer
becomes a plain one, batch-norm folded in, with its weight stored as int8.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import fx, nn
from torch.ao.quantization import FakeQuantizeBase
from torch.nn import functional as F

from qat_lightning.fake_quantize import FakeQuantize
from qat_lightning.modes.graft import is_grafted, regraft, ungraft
from qat_lightning.modes.tracing import evaluate_only
from qat_lightning.modes.trained import settle_bias
from qat_lightning.quiet import quiet_torch_ao

_OPS = torch.ops.quantized_decomposed


class QuantizeDequantize(nn.Module):
    """Rounds its input to a fixed grid, as two operations that an exporter can see."""

    def __init__(self, fake_quantize: Any) -> None:
        super().__init__()
        scale, zero_point = fake_quantize.calculate_qparams()
        self.scale, self.zero_point = float(scale), int(zero_point)
        self.bounds = _bounds(fake_quantize)
        self.dtype = torch.int8 if self.bounds[0] < 0 else torch.uint8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = (self.scale, self.zero_point, *self.bounds, self.dtype)
        return _OPS.dequantize_per_tensor(_OPS.quantize_per_tensor(x, *grid), *grid)


class ReferenceLayer(nn.Module):
    """A convolution or linear layer whose weight is stored as int8 and dequantized where it is used.

    Args:
        layer: The float layer, with batch-norm folded in.
        fake_quantize: The grid of its weight.
        relu: Whether a ReLU is fused into it.
    """

    def __init__(self, layer: Any, fake_quantize: Any, relu: bool) -> None:
        super().__init__()
        scale, zero_point = fake_quantize.calculate_qparams()
        self.layer, self.relu = layer, relu
        self.axis = int(fake_quantize.ch_axis) if scale.numel() > 1 else None
        self.bounds = _bounds(fake_quantize)
        if self.axis is None:
            self.scale, self.zero_point = float(scale), int(zero_point)
        else:
            self.register_buffer("scale", scale.detach().float())
            self.register_buffer("zero_point", zero_point.detach().to(torch.int32))
        quantize = _OPS.quantize_per_tensor if self.axis is None else _OPS.quantize_per_channel
        self.register_buffer("int8", quantize(layer.weight.detach().float(), *self._grid()))
        del layer.weight

    def _grid(self) -> tuple[Any, ...]:
        if self.axis is None:
            return self.scale, self.zero_point, *self.bounds, torch.int8
        return self.scale, self.zero_point, self.axis, *self.bounds, torch.int8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dequantize = _OPS.dequantize_per_tensor if self.axis is None else _OPS.dequantize_per_channel
        weight = dequantize(self.int8, *self._grid())
        if isinstance(self.layer, nn.Linear):
            y = F.linear(x, weight, self.layer.bias)
        else:
            y = self.layer._conv_forward(x, weight, self.layer.bias)
        return F.relu(y) if self.relu else y


def _bounds(fake_quantize: Any) -> tuple[int, int]:
    """The least and the greatest integer that a fake-quantize rounds to."""
    if isinstance(fake_quantize, FakeQuantize):
        return fake_quantize.bounds
    observer = fake_quantize.activation_post_process
    return int(observer.quant_min), int(observer.quant_max)


def reference(prepared: nn.Module) -> nn.Module:
    """Makes the reference graph of a prepared network, in eval mode on the CPU, of a copy."""
    return _rebuilt(prepared, _reference_layer, _quantize_dequantize)


def floating(prepared: nn.Module) -> nn.Module:
    """The same without any rounding: the float network with the trained weights, batch-norm folded in."""
    return _rebuilt(prepared, _float_layer, lambda child: nn.Identity())


def _rebuilt(
    prepared: nn.Module, layer: Callable[[Any], nn.Module], rounding: Callable[[Any], nn.Module]
) -> nn.Module:
    module = copy.deepcopy(prepared).cpu().eval()
    for network in list(module.modules()):
        if isinstance(network, fx.GraphModule):
            evaluate_only(network)
        elif is_grafted(network):
            graph_module = ungraft(network)
            evaluate_only(graph_module)
            regraft(network, graph_module)
    with quiet_torch_ao():  # an eager network may hold fake-quantizes that never run
        _replace_each(module, lambda m: hasattr(m, "weight_fake_quant"), layer)
        _replace_each(module, lambda m: isinstance(m, FakeQuantizeBase), rounding)
    return module


def _reference_layer(child: Any) -> nn.Module:
    settle_bias(child)
    plain = child.to_float()
    fused = isinstance(plain, nn.Sequential)
    layer = ReferenceLayer(plain[0] if fused else plain, child.weight_fake_quant, relu=fused)
    # Eager mode keeps the fake-quantize of a layer's output in a child that a forward hook calls.
    if hasattr(child, "activation_post_process"):
        layer.activation_post_process = child.activation_post_process
        layer._forward_hooks.update(child._forward_hooks)
    return layer.eval()


def _float_layer(child: Any) -> nn.Module:
    return child.to_float().eval()


def _quantize_dequantize(child: Any) -> nn.Module:
    return QuantizeDequantize(child) if bool(child.fake_quant_enabled.any()) else nn.Identity()


def _replace_each(
    module: nn.Module, chosen: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]
) -> None:
    """Replaces the chosen modules; one that is registered twice (a shared observer) stays shared."""
    made: dict[nn.Module, nn.Module] = {}
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if name and chosen(child):
            parent, _, leaf = name.rpartition(".")
            made[child] = made.get(child) or make(child)
            setattr(module.get_submodule(parent), leaf, made[child])
