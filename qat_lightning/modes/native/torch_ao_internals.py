"""The private names of torch.ao, each behind a public one.

A new version may change any of them: `tests/test_internals.py` tells which one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.ao.nn.intrinsic import _FusedModule
from torch.ao.quantization.fx._lower_to_native_backend import _lower_to_native_backend

FusedModule = _FusedModule


def unpacked(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and the bias of an int8 layer, as plain tensors."""
    return layer._weight_bias()


def lower_to_kernels(reference: fx.GraphModule, scopes: dict[str, Any]) -> fx.GraphModule:
    """Replaces what torch.ao has int8 kernels for, between a dequantize and a quantize, by these kernels."""
    return _lower_to_native_backend(reference, {}, scopes)
