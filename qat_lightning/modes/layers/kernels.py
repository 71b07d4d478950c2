"""Which kernels the layers of an int8 network run on, where those of its own engine are wrong or slow."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.ao.nn import quantized

from qat_lightning.base import cpu
from qat_lightning.base.backends import engine

_EXACT = "qnnpack"
"""The engine whose kernels add in 32 bits on every CPU."""


def pack_weights(network: nn.Module, backend: str) -> None:
    """Packs the weights of an int8 network for kernels that are right on this CPU, and fast if they can be.

    Only those of onednn need it, which uses all 8 bits of the activations. On CPUs without VNNI its kernels
    overflow; qnnpack's do not, and are several times slower. Convolutions in one and three dimensions stay,
    which qnnpack has not. On CPUs with VNNI, oneDNN has nothing but its reference code, many times slower,
    for a linear layer whose input has a zero point; fbgemm, which the x86 engine takes for linear layers,
    adds up the same integers.
    """
    if backend != "onednn":
        return
    kinds: tuple[type[nn.Module], ...] = (quantized.Linear,)
    kernels = "x86"
    if cpu.overflows():
        kinds, kernels = (quantized.Linear, quantized.Conv2d), _EXACT
    if kernels not in torch.backends.quantized.supported_engines:
        return
    layers: list[Any] = [module for module in network.modules() if isinstance(module, kinds)]
    with engine(kernels):
        for layer in layers:
            layer.set_weight_bias(*layer._weight_bias())
