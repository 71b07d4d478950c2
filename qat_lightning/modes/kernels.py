"""Which kernels the linear layers of an int8 network run on."""

from __future__ import annotations

import torch
from torch import nn
from torch.ao.nn import quantized

from qat_lightning.backends import engine


def pack_linears(network: nn.Module, backend: str) -> None:
    """Packs the weights of an int8 network's linear layers for kernels that are fast.

    Where an input has a zero point, oneDNN has nothing but its reference code, many times slower. fbgemm,
    which the x86 engine takes for linear layers, adds up the same integers; on CPUs with VNNI it cannot
    saturate either.
    """
    if backend != "onednn" or not torch.cpu._is_vnni_supported():
        return
    with engine("x86"):
        for module in network.modules():
            if isinstance(module, quantized.Linear):
                module.set_weight_bias(*module._weight_bias())
