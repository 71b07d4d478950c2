"""Chooses other kernels for the layers of an int8 network where its own engine's are wrong or slow."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.ao.nn import quantized

from qat_lightning.base import cpu
from qat_lightning.base.backends import engine, engine_of
from qat_lightning.modes.native.torch_ao_internals import unpacked

_EXACT = "qnnpack"
"""The engine whose kernels add in 32 bits on every CPU, so that they never overflow."""


def pack_weights(network: nn.Module, backend: str) -> None:
    """Packs the weights of an int8 network for kernels that are correct on this CPU, and fast where possible.

    Only the onednn backend needs this, which uses all 8 bits of the activations.

    - On CPUs without VNNI oneDNN's kernels overflow. qnnpack's do not, but are several times slower. qnnpack
      has no convolutions in one or three dimensions, so that those keep oneDNN's kernels.
    - On CPUs with VNNI, oneDNN runs a linear layer whose input has a zero point with its reference code,
      which is many times slower. The x86 engine runs linear layers with fbgemm, which adds up the same
      integers.
    """
    if engine_of(backend) != "onednn":
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
            layer.set_weight_bias(*unpacked(layer))
