"""The private names of torch.ao, each behind a public one.

A new version may change any of them: `tests/test_internals.py` tells which one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import fx
from torch.ao.nn.intrinsic import _FusedModule
from torch.ao.quantization.backend_config import BackendPatternConfig

FusedModule = _FusedModule
quantized_decomposed = torch.ops.quantized_decomposed
"""Quantize and dequantize as operations that an exporter knows."""


def unpacked(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and the bias of an int8 layer, as plain tensors."""
    return layer._weight_bias()


def observed_nodes(prepared: fx.GraphModule) -> set[str]:
    """The names of the nodes that torch.ao computes in int8, as far as it has a kernel."""
    return set(prepared.meta["_observed_graph_module_attrs"].observed_node_names)


def give_results_with_numbers_qparams(config: BackendPatternConfig) -> None:
    """Lets the result of a sum or product with a number have its own qparams: torch.ao shares the input's."""
    config._set_num_tensor_args_to_observation_type({})
