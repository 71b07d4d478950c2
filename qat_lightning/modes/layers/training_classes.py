"""Swaps the classes of prepared layers: this package's for training, torch.ao's for conversion."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qat_lightning.fake_quant.fake_quantize import FakeQuantize
from qat_lightning.modes.layers import fused_conv_bn, integer_arithmetic
from qat_lightning.modes.layers.fused_conv_bn import FusedConvBn
from qat_lightning.modes.layers.integer_arithmetic import IntegerArithmetic, input_fake_quantize, round_bias

_TRAINING_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    next(base for base in ours.__bases__ if issubclass(base, nn.Module)): ours
    for module in (integer_arithmetic, fused_conv_bn)
    for ours in vars(module).values()
    if isinstance(ours, type) and issubclass(ours, IntegerArithmetic) and issubclass(ours, nn.Module)
}
_TORCH_AO_CLASSES = {ours: theirs for theirs, ours in _TRAINING_CLASSES.items()}


def use_training_classes(prepared: nn.Module) -> None:
    """Gives layers whose weights have this package's :class:`FakeQuantize` their training class, in place.

    A fused convolution and batch-norm changes only if the qparams of its weight are symmetric and
    per-channel. Layers keep their names and their state.
    """
    module: Any
    for module in prepared.modules():
        fake_quant = getattr(module, "weight_fake_quant", None)
        if not isinstance(fake_quant, FakeQuantize):
            continue
        if fake_quant.axis == 0:
            fake_quant.allocate(module.weight.shape[0])
        ours = _TRAINING_CLASSES.get(type(module))
        commutes = fake_quant.axis == 0 and fake_quant.symmetric  # folding batch-norm with rounding
        if ours is not None and (commutes or not issubclass(ours, FusedConvBn)):
            module.__class__ = ours


def use_torch_ao_classes(prepared: nn.Module) -> None:
    """Gives these layers torch.ao's classes back, in place, with the biases that eval mode computes with.

    torch.ao's convert knows its own classes only.
    """
    for module in prepared.modules():
        if type(module) in _TORCH_AO_CLASSES:
            store_rounded_bias(module)
            module.__class__ = _TORCH_AO_CLASSES[type(module)]


@torch.no_grad()
def store_rounded_bias(layer: Any) -> None:
    """Rounds a layer's bias as eval mode does, in place, so that the int8 layer has the same bias."""
    source = input_fake_quantize(layer)
    bias = layer.folded_bias() if isinstance(layer, FusedConvBn) else layer.bias
    if source is None or bias is None or not source.rounding:
        return
    change = round_bias(bias, source.scale * layer.weight_fake_quant.scale) - bias
    owner = layer.bn if isinstance(layer, FusedConvBn) else layer
    owner.bias = nn.Parameter(change if owner.bias is None else owner.bias + change)
