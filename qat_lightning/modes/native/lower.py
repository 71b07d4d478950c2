"""Makes an int8 graph of PyTorch's quantized tensors from a prepared graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.ao.nn import intrinsic as nni
from torch.ao.nn.quantized import reference as nnqr
from torch.ao.quantization.utils import get_qparam_dict
from torch.nn import functional as F

from qat_lightning.base.torch_internals import BatchNorm, parameters_of
from qat_lightning.modes.functions.pads import pad_values
from qat_lightning.modes.graph.constants import Constants
from qat_lightning.modes.graph.nodes import called_modules, fake_quantize_of
from qat_lightning.modes.layers.norm_relu import NormReLU
from qat_lightning.modes.layers.trained_layer import TrainedLayer
from qat_lightning.modes.layers.transposed import TransposedLayer
from qat_lightning.modes.lowering.reading import float_layer
from qat_lightning.modes.lowering.reference import ReferenceLayer, ReferenceWeight
from qat_lightning.modes.lowering.rows import hold_rows
from qat_lightning.modes.lowering.spell_out import spell_out
from qat_lightning.modes.lowering.unseen_weights import observe, observe_weights
from qat_lightning.modes.native.packed_weights import hold_packed_weights
from qat_lightning.modes.native.reused_modules import copy_reused_modules
from qat_lightning.modes.native.torch_ao_internals import lower_to_kernels
from qat_lightning.modes.passes.insert import AFTER_FLOAT
from qat_lightning.modes.trace.own_layers import with_own_parameters

_REFERENCES: dict[Any, tuple[Any, Any]] = {
    nn.Conv1d: (nnqr.Conv1d, nni.ConvReLU1d),
    nn.Conv2d: (nnqr.Conv2d, nni.ConvReLU2d),
    nn.Conv3d: (nnqr.Conv3d, nni.ConvReLU3d),
    nn.Linear: (nnqr.Linear, nni.LinearReLU),
}
_NORMS_WITH_RELU: dict[Any, Any] = {nn.BatchNorm2d: nni.BNReLU2d, nn.BatchNorm3d: nni.BNReLU3d}


_KNOWN: dict[tuple[str, Any], tuple[str, Any]] = {
    **dict.fromkeys((("call_function", torch.relu), ("call_method", "relu")), ("call_function", F.relu)),
    **dict.fromkeys((("call_function", torch.relu_), ("call_method", "relu_")), ("call_function", F.relu)),
    ("call_function", torch.permute): ("call_method", "permute"),
    ("call_function", torch.reshape): ("call_method", "reshape"),
}
"""Operations that torch.ao lowers only in another form, and that form."""


def lower(prepared: fx.GraphModule) -> fx.GraphModule:
    """Returns the int8 graph of a prepared one, which is consumed. It must be in eval mode on the CPU."""
    # PyTorch warns of the first quantized tensor of a process. Here the caller is quiet; a forward is not.
    torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
    with_own_parameters(prepared)
    copy_reused_modules(prepared)
    spell_out(prepared)
    for name, module in list(prepared.named_modules(remove_duplicate=False)):
        if isinstance(module, TrainedLayer):
            prepared.set_submodule(name, _reference(module))
    for node in prepared.graph.nodes:
        node.op, node.target = _KNOWN.get((node.op, node.target), (node.op, node.target))
    _use_plain_norms(prepared)
    observe_weights(prepared)
    _store_rows(prepared)
    _quantize(prepared)
    scopes = {node.name: (str(node.target), None) for node in prepared.graph.nodes}
    return hold_packed_weights(_tidied(_pad_integers(lower_to_kernels(prepared, scopes))))


def _reference(layer: TrainedLayer) -> nn.Module:
    """Returns torch.ao's reference layer, a float layer that knows the qparams of its weight.

    torch.ao transposes convolutions only with one scale for the whole weight. Here they compute with floats,
    from an int8 weight.
    """
    plain, fake_quantize = layer.to_int8(), layer.weight_fake_quant
    observe(fake_quantize, lambda: layer.rows_of(plain.weight))
    if isinstance(layer, TransposedLayer):
        return float_layer(ReferenceLayer(plain, fake_quantize, layer.relu, layer.stored_scales()))
    reference, with_relu = _REFERENCES[layer.plain]
    made: nn.Module = reference.from_float(plain, get_qparam_dict(fake_quantize))
    if not layer.relu:
        return made
    fused: Any = with_relu(plain, nn.ReLU())
    fused[0] = made
    return fused  # type: ignore[no-any-return]


def _store_rows(prepared: fx.GraphModule) -> None:
    """Stores the weights of embeddings as int8, if they are rounded, in place."""
    for node in prepared.graph.nodes:
        rounding = node.args[1] if node.target is F.embedding else node
        fake_quantize = fake_quantize_of(prepared, rounding)
        if rounding is not node and fake_quantize is not None:
            weight = Constants(prepared).of(rounding.all_input_nodes[0])
            prepared.set_submodule(str(rounding.target), ReferenceWeight(fake_quantize, weight))
    hold_rows(prepared, ReferenceWeight)


def _use_plain_norms(prepared: fx.GraphModule) -> None:
    """Gives each batch-norm the form that torch.ao lowers, in place."""
    for name, module in called_modules(prepared).items():
        norm: Any = module[0] if isinstance(module, NormReLU) else module
        if isinstance(norm, BatchNorm):
            _give_factors(norm)
        if isinstance(module, NormReLU):
            prepared.set_submodule(name, _NORMS_WITH_RELU[type(norm)](norm, nn.ReLU()).eval())


def _give_factors(norm: Any) -> None:
    """Gives a batch-norm without factors those that change nothing: the kernel needs them."""
    if not norm.affine and norm.running_mean is not None:
        one = torch.ones_like(norm.running_mean)
        for name, value in (("weight", one), ("bias", torch.zeros_like(one))):
            parameters_of(norm)[name] = nn.Parameter(value, requires_grad=False)
        norm.affine = True


def _quantize(prepared: fx.GraphModule) -> None:
    """Replaces each fake-quantize of a graph by a quantize and a dequantize, in place."""
    graph = prepared.graph
    for node in list(graph.nodes):
        fake_quantize = fake_quantize_of(prepared, node)
        if fake_quantize is None:
            continue
        source = node.args[0]
        with graph.inserting_before(node):
            if node.name in prepared.meta.get(AFTER_FLOAT, ()) and source.op.startswith("call_"):
                source = graph.call_function(in_float, (source,))
            arguments = _qparams(prepared, fake_quantize, source)
            quantize = torch.quantize_per_tensor if len(arguments) == 3 else torch.quantize_per_channel
            integers = graph.call_function(quantize, (source, *arguments))
            node.replace_all_uses_with(graph.call_method("dequantize", (integers,)))
        graph.erase_node(node)
    prepared.delete_all_unused_submodules()
    prepared.recompile()


def _pad_integers(int8: fx.GraphModule) -> fx.GraphModule:
    """Lets paddings, which torch.ao does not know, run on integers, in place."""
    for node in list(int8.graph.nodes):
        pad = node.args[0] if node.target is torch.quantize_per_tensor else None
        if pad is not None and pad.target is pad_values and pad.args[0].target == "dequantize":
            pad.replace_input_with(pad.args[0], pad.args[0].args[0])
            node.replace_all_uses_with(pad)
    return int8


def _tidied(int8: fx.GraphModule) -> fx.GraphModule:
    """Removes what only kept torch.ao from lowering, in place."""
    for node in list(int8.graph.nodes):
        if node.target is in_float:
            node.replace_all_uses_with(node.args[0])
    int8.graph.eliminate_dead_code()
    int8.recompile()
    return int8


def _qparams(prepared: fx.GraphModule, fake_quantize: Any, source: fx.Node) -> tuple[Any, ...]:
    """Returns the arguments of a quantize after its input; scale and zero point become buffers."""
    scale, zero_point = fake_quantize.calculate_qparams()
    dtype, axis = fake_quantize.dtype, tuple[int, ...]()
    if fake_quantize.is_per_channel:
        axis = (fake_quantize.ch_axis,)
        values = (scale.double(), zero_point.long())
    else:
        if dtype == torch.qint8:  # kernels read unsigned activations
            dtype, zero_point = torch.quint8, zero_point + 128
        values = (scale.reshape(()), zero_point.reshape(()))
    nodes = []
    for kind, value in zip(("scale", "zero_point"), values, strict=True):
        name = _new_name(prepared, f"{source.name}_{kind}")
        prepared.register_buffer(name, value.clone())
        nodes.append(prepared.graph.get_attr(name))
    return (*nodes, *axis, dtype)


def _new_name(module: nn.Module, prefix: str) -> str:
    number = 0
    while hasattr(module, f"{prefix}_{number}"):
        number += 1
    return f"{prefix}_{number}"


def in_float(x: torch.Tensor) -> torch.Tensor:
    """Returns `x`: what comes before computes in float, although torch.ao knows an int8 kernel for it."""
    return x
