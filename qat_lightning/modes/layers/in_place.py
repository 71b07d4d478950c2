"""Rounding in place, so that training needs little more memory than in float.

A float network keeps one tensor for each layer and each ReLU. Plain fake-quantization also keeps the input of
each rounding, and behind a ReLU the ReLU's own copy of its result. Where a fake-quantize is the only reader
of a tensor, it rounds the tensor in place, and the ReLU and the rounding save only a byte for each element.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.base.torch_internals import forward_hooks
from qat_lightning.fake_quant.fake_quantize import FakeQuantize
from qat_lightning.fake_quant.numerics import rectify
from qat_lightning.modes.graph.nodes import RELUS, call_target, module_of, sole_reader
from qat_lightning.modes.layers.fused_conv_bn import FusedConvBn
from qat_lightning.modes.layers.norm_relu import NormReLU
from qat_lightning.modes.layers.trained_layer import TrainedLayer

_SMOOTH: frozenset[Any] = frozenset({nn.SiLU, nn.Hardswish, F.silu, F.hardswish})
_MAKES_NEW_TENSOR: frozenset[Any] = _SMOOTH | {
    *(rectify, operator.add, torch.add, operator.mul, torch.mul, nn.GELU, F.gelu, NormReLU),
    *(nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, F.layer_norm),
}
"""Operations with a result that is a new tensor, which their own gradient does not need."""


def round_in_place(prepared: nn.Module) -> None:
    """Lets fake-quantizes overwrite tensors that nothing else reads, in a prepared eager network or graph."""
    if isinstance(prepared, fx.GraphModule):
        _keep_inputs(prepared)
        _rectify_relus(prepared)
        readers = _sole_readers(prepared)
    else:
        layers: list[Any] = [m for m in prepared.modules() if _feeds_only_its_fake_quantize(m)]
        readers = [layer.activation_post_process for layer in layers]
    for fake_quantize in readers:
        if isinstance(fake_quantize, FakeQuantize):
            fake_quantize.in_place = True


def restore_relus(prepared: fx.GraphModule) -> None:
    """Restores the plain ReLUs of a graph, in place: kernels and files know only those."""
    for node in prepared.graph.nodes:
        if node.target is rectify:
            node.target, node.kwargs = F.relu, {}
    prepared.recompile()


def _keep_inputs(graph_module: fx.GraphModule) -> None:
    """Stops smooth activations from overwriting their input: for its gradient they would copy it first."""
    for node in graph_module.graph.nodes:
        module = module_of(graph_module, node)
        if call_target(graph_module, node) not in _SMOOTH:
            continue
        if module is not None:
            module.inplace = False
        else:
            node.args, node.kwargs = (node.all_input_nodes[0],), {}


def _rectify_relus(graph_module: fx.GraphModule) -> None:
    """Replaces each ReLU that only a fake-quantize reads by one that saves a byte for each element."""
    for node in graph_module.graph.nodes:
        module = module_of(graph_module, node)
        if call_target(graph_module, node) in RELUS and _sole_rounding(graph_module, node) is not None:
            spelled_in_place = str(getattr(node.target, "__name__", node.target)).endswith("_")
            in_place = getattr(module, "inplace", False) or node.kwargs.get("inplace") or spelled_in_place
            in_place = in_place or _is_overwritable(graph_module, node.all_input_nodes[0])
            node.op, node.target = "call_function", rectify
            node.args, node.kwargs = node.args[:1], {"in_place": bool(in_place)}
    graph_module.recompile()


def _sole_readers(graph_module: fx.GraphModule) -> list[FakeQuantize]:
    """Finds the fake-quantizes that may overwrite their input, wherever the graph calls them.

    At each call nothing else may read the input, and the operation before must not need it for its gradient.
    """
    calls: dict[FakeQuantize, list[bool]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        fake_quantize = module_of(graph_module, node)
        if isinstance(fake_quantize, FakeQuantize):
            calls[fake_quantize].append(_is_overwritable(graph_module, node.all_input_nodes[0]))
    return [fake_quantize for fake_quantize, overwritable in calls.items() if all(overwritable)]


def _is_overwritable(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node makes a new tensor that its own gradient does not need, and one operation reads it."""
    is_layer = isinstance(module_of(graph_module, node), TrainedLayer)
    makes_new = is_layer or call_target(graph_module, node) in _MAKES_NEW_TENSOR
    return makes_new and "out" not in node.kwargs and sole_reader(node) is not None


def _sole_rounding(graph_module: fx.GraphModule, node: fx.Node) -> FakeQuantize | None:
    reader = sole_reader(node)
    called = None if reader is None else module_of(graph_module, reader)
    return called if isinstance(called, FakeQuantize) else None


def _feeds_only_its_fake_quantize(module: nn.Module) -> bool:
    """Whether the only hook of an eager layer is the one that passes its output to its fake-quantize."""
    return isinstance(module, FusedConvBn) and len(forward_hooks(module)) == 1
