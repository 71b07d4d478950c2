"""Gives int8 functions with a weight that a forward computes a module each, which a file can hold.

torch.ao packs such a weight, which depends on parameters alone, into an object for its kernel. It keeps the
object as an attribute of the graph module, and its state dict holds the object itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.ao.nn import quantized
from torch.ao.nn.intrinsic import quantized as fused

_OPS = torch.ops.quantized
_KINDS: dict[Any, Any] = {
    _OPS.linear: quantized.Linear,
    _OPS.linear_relu: fused.LinearReLU,
    _OPS.conv1d: quantized.Conv1d,
    _OPS.conv1d_relu: fused.ConvReLU1d,
    _OPS.conv2d: quantized.Conv2d,
    _OPS.conv2d_relu: fused.ConvReLU2d,
    _OPS.conv3d: quantized.Conv3d,
    _OPS.conv3d_relu: fused.ConvReLU3d,
}


def hold_packed_weights(int8: fx.GraphModule) -> fx.GraphModule:
    """Replaces each call of such a function by the call of a module, in place."""
    graph = int8.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _KINDS or node.args[1].op != "get_attr":
            continue
        x, *reads = node.args
        packed, scale, zero_point = (getattr(int8, str(read.target)) for read in reads)
        name = f"{str(reads[0].target).strip('_')}_layer"
        int8.add_submodule(name, _module(_KINDS[node.target], packed, float(scale), int(zero_point)))
        with graph.inserting_before(node):
            call = graph.call_module(name, (x,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        for read in reads:
            if not read.users:
                graph.erase_node(read)
                if not any(other.target == read.target for other in graph.nodes):
                    delattr(int8, str(read.target))
    int8.recompile()
    return int8


def _module(kind: Any, packed: Any, scale: float, zero_point: int) -> torch.nn.Module:
    if issubclass(kind, quantized.Linear):
        weight, bias = _OPS.linear_unpack(packed)
        module = kind(weight.shape[1], weight.shape[0])
    else:
        weight, bias, settings = _unpacked(kind, packed)
        *places, groups = settings
        channels = weight.shape[1] * groups, weight.shape[0]
        module = kind(*channels, tuple(weight.shape[2:]), *places, groups)
    module.set_weight_bias(weight, bias)
    module.scale, module.zero_point = scale, zero_point
    return module.eval()  # type: ignore[no-any-return]


def _unpacked(kind: Any, packed: Any) -> tuple[torch.Tensor, torch.Tensor | None, tuple[Any, ...]]:
    """Returns the weight, the bias and the settings of a packed convolution."""
    dims = 1 if issubclass(kind, quantized.Conv1d) else 3 if issubclass(kind, quantized.Conv3d) else 2
    weight, bias = getattr(_OPS, f"conv{dims}d_unpack")(packed)
    stored = max(dims, 2)  # one dimension is packed as two
    names = ("stride", "padding", "dilation")
    places = (tuple(getattr(_OPS, f"conv{stored}d_{name}")(packed)[-dims:]) for name in names)
    return weight, bias, (*places, getattr(_OPS, f"conv{stored}d_groups")(packed))
