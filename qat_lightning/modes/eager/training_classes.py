"""Swaps the classes of prepared layers in eager mode: this package's for training, torch.ao's to convert."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.ao.nn import qat as nnqat
from torch.ao.nn.intrinsic import qat as nniqat

from qat_lightning.modes.layers import fused_conv_bn, trained_layer
from qat_lightning.modes.layers.fused_conv_bn import FusedConvBn
from qat_lightning.modes.layers.integer_arithmetic import input_fake_quantize, round_bias
from qat_lightning.modes.layers.trained_layer import TrainedLayer

_OURS: dict[Any, tuple[type[TrainedLayer], bool]] = {
    nnqat.Conv1d: (trained_layer.Conv1d, False),
    nnqat.Conv2d: (trained_layer.Conv2d, False),
    nnqat.Conv3d: (trained_layer.Conv3d, False),
    nnqat.Linear: (trained_layer.Linear, False),
    nniqat.ConvReLU1d: (trained_layer.Conv1d, True),
    nniqat.ConvReLU2d: (trained_layer.Conv2d, True),
    nniqat.ConvReLU3d: (trained_layer.Conv3d, True),
    nniqat.LinearReLU: (trained_layer.Linear, True),
    nniqat.ConvBn1d: (fused_conv_bn.ConvBn1d, False),
    nniqat.ConvBn2d: (fused_conv_bn.ConvBn2d, False),
    nniqat.ConvBn3d: (fused_conv_bn.ConvBn3d, False),
    nniqat.LinearBn1d: (fused_conv_bn.LinearBn1d, False),
    nniqat.ConvBnReLU1d: (fused_conv_bn.ConvBn1d, True),
    nniqat.ConvBnReLU2d: (fused_conv_bn.ConvBn2d, True),
    nniqat.ConvBnReLU3d: (fused_conv_bn.ConvBn3d, True),
}
"""By torch.ao's class: this package's, and whether it holds a ReLU."""
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def use_training_classes(prepared: nn.Module) -> None:
    """Gives the layers of a prepared network their training classes, in place; they keep their state."""
    module: Any
    for module in prepared.modules():
        if type(module) in _OURS:
            ours, relu = _OURS[type(module)]
            module.__class__, module.relu = ours, relu
            module.allocate()


def use_torch_ao_classes(prepared: nn.Module) -> None:
    """Gives these layers torch.ao's classes back, in place, with the biases that eval mode computes with."""
    module: Any
    for module in prepared.modules():
        if (type(module), getattr(module, "relu", None)) in _THEIRS:
            _store_rounded_bias(module)
            module.__class__ = _THEIRS[type(module), vars(module).pop("relu")]


@torch.no_grad()
def _store_rounded_bias(layer: Any) -> None:
    source = input_fake_quantize(layer)
    bias = layer.folded_bias() if isinstance(layer, FusedConvBn) else layer.bias
    if source is None or bias is None or not source.rounding:
        return
    change = round_bias(bias, source.scale * layer.weight_fake_quant.scale) - bias
    owner = layer.bn if isinstance(layer, FusedConvBn) else layer
    owner.bias = nn.Parameter(change if owner.bias is None else owner.bias + change)
