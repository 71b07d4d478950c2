"""Stores qparams that torch.ao keeps in plain attributes, which no state dict has."""

from __future__ import annotations

import torch
from torch import nn
from torch.ao.nn import quantized


def store_qparams(int8: nn.Module) -> None:
    """Turns the scale and the zero point of each int8 ELU into buffers, in place, as those of others are."""
    for module in int8.modules():
        if type(module) is quantized.ELU:
            for name in ("scale", "zero_point"):
                value = vars(module).pop(name, None)
                if value is not None:
                    module.register_buffer(name, torch.tensor(value))
