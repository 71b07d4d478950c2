"""Keeps modules of an eager network float between int8 neighbours.

Such a module dequantizes its inputs and rounds its output with qparams of its own, in training as in int8.
Hooks and a stub do this, so that the names of the parameters stay.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.ao import quantization as ao
from torch.ao.nn.quantized import Quantize

from qat_lightning.base.subclass import forward_of
from qat_lightning.base.torch_internals import (
    AdaptiveAvgPool,
    AvgPool,
    BatchNorm,
    ConvTranspose,
    tree_leaves,
    tree_map,
)
from qat_lightning.modes.layers.lacks_int8 import lacks_int8
from qat_lightning.modes.native.torch_ao_internals import FusedModule
from qat_lightning.modes.trace.padded_layers import pads_by_itself

_logger = logging.getLogger(__name__)
_AVERAGES = (AvgPool, AdaptiveAvgPool)


def keep_float(module: nn.Module, qconfig: Any) -> None:
    """Keeps `module` float between int8 neighbours."""
    for child in module.modules():
        child.qconfig = None  # type: ignore[assignment]
    if isinstance(module, FusedModule):
        module.__class__ = nn.Sequential  # type: ignore[assignment]  # torch.ao does not look inside a fused one
    module.requantize = ao.QuantStub(qconfig)
    module.register_forward_pre_hook(_dequantize_inputs, with_kwargs=True)
    if forward_of(module) is not nn.Sequential.forward:  # a Sequential runs the stub as its last layer
        module.register_forward_hook(_quantize_output)


def compute_in_float(network: nn.Module) -> None:
    """Does the same for modules with no int8 form, or a poor one, in a network whose modules have QConfigs.

    An int8 average pool rounds with the qparams of its input. That is coarse for averages, and training would
    not simulate it.
    """
    _keep_padded_layers_float(network)
    fused = {child for module in network.modules() if isinstance(module, FusedModule) for child in module}
    for module in [module for module in network.modules() if module not in fused]:
        qconfig: Any = getattr(module, "qconfig", None)
        if qconfig is not None and (isinstance(module, _AVERAGES) or _lacks_int8(module)):
            module.qconfig = None  # type: ignore[assignment]
            module.requantize = ao.QuantStub(qconfig)
            module.register_forward_pre_hook(_dequantize_if_int8, with_kwargs=True)
            module.register_forward_hook(_quantize_if_int8)


def _keep_padded_layers_float(network: nn.Module) -> None:
    """Keeps convolutions float whose padding int8 kernels do not support, with what is fused to them."""
    for name, module in list(network.named_modules()):
        layer = next(iter(module)) if isinstance(module, FusedModule) else module
        qconfig: Any = getattr(module, "qconfig", None)
        if qconfig is not None and pads_by_itself(layer):
            keep_float(module, qconfig)
            _say_once(name, layer.padding_mode)


@cache
def _say_once(name: str, mode: str) -> None:
    _logger.info("%r stays float: eager mode has no int8 convolution with padding_mode=%r.", name, mode)


def _lacks_int8(module: nn.Module) -> bool:
    """Whether eager mode has no int8 form of `module` that training can simulate."""
    if isinstance(module, BatchNorm):
        exists = type(module) in (nn.BatchNorm2d, nn.BatchNorm3d)
        return not (exists and module.affine and module.track_running_stats)
    return isinstance(module, ConvTranspose) or lacks_int8(module)


def _dequantize_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map(lambda value: value.dequantize() if _is_int8(value) else value, (args, kwargs))


def _quantize_output(module: Any, args: Any, output: Any) -> Any:
    return module.requantize(output)


def _dequantize_if_int8(module: Any, args: Any, kwargs: Any) -> Any:
    """Dequantizes the inputs, and notes whether any was int8.

    Before the QuantStub and after the DeQuantStub of a network none is, and the output stays float, too.
    """
    if isinstance(module.requantize, Quantize):
        module.between_int8 = any(_is_int8(value) for value in tree_leaves((args, kwargs)))
    return _dequantize_inputs(module, args, kwargs)


def _quantize_if_int8(module: Any, args: Any, output: Any) -> Any:
    return module.requantize(output) if getattr(module, "between_int8", True) else output


def _is_int8(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_quantized
