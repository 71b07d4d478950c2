"""The classes that layers train in, in the place of torch.ao's, and back: its convert knows its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qat_lightning.fake_quant.fake_quantize import FakeQuantize
from qat_lightning.modes.layers import fused_conv_bn, integer_arithmetic
from qat_lightning.modes.layers.fused_conv_bn import FusedConvBn
from qat_lightning.modes.layers.integer_arithmetic import IntegerArithmetic, input_fake_quantize, round_bias

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    next(base for base in ours.__bases__ if issubclass(base, nn.Module)): ours
    for module in (integer_arithmetic, fused_conv_bn)
    for ours in vars(module).values()
    if isinstance(ours, type) and issubclass(ours, IntegerArithmetic) and issubclass(ours, nn.Module)
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def use_training_classes(prepared: nn.Module) -> None:
    """Makes the layers in a prepared network ours where their weights have this package's grid, in place.

    A pair of convolution and batch-norm only where that grid is symmetric for each channel. Layers keep their
    names and state: only the class of each changes.
    """
    module: Any
    for module in prepared.modules():
        grid = getattr(module, "weight_fake_quant", None)
        if not isinstance(grid, FakeQuantize):
            continue
        if grid.axis == 0:
            grid.allocate(module.weight.shape[0])
        ours = _OURS.get(type(module))
        if ours is not None and (not issubclass(ours, FusedConvBn) or (grid.axis == 0 and grid.symmetric)):
            module.__class__ = ours


def use_torch_ao_classes(prepared: nn.Module) -> None:
    """Turns them back into torch.ao's, in place, with the biases that they computed with."""
    for module in prepared.modules():
        if type(module) in _THEIRS:
            store_rounded_bias(module)
            module.__class__ = _THEIRS[type(module)]


@torch.no_grad()
def store_rounded_bias(layer: Any) -> None:
    """Gives a layer the bias that it computes with in eval mode, in place, so that int8 gets that one."""
    grid = input_fake_quantize(layer)
    bias = layer.folded_bias() if isinstance(layer, FusedConvBn) else layer.bias
    if grid is None or bias is None or not grid.rounding:
        return
    moved = round_bias(bias, grid.scale * layer.weight_fake_quant.scale) - bias
    owner = layer.bn if isinstance(layer, FusedConvBn) else layer
    owner.bias = nn.Parameter(moved if owner.bias is None else owner.bias + moved)
