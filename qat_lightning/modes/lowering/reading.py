"""Reads a reference graph: makes operations on bytes of its modules."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.base.torch_internals import Convolution, ConvTranspose
from qat_lightning.modes.graph.nodes import module_of
from qat_lightning.modes.lowering.graph import Writer, arguments
from qat_lightning.modes.lowering.int8.layers import Geometry, Int8Layer, Weight
from qat_lightning.modes.lowering.int8.paddings import PadValues, ZeroPad
from qat_lightning.modes.lowering.int8.qparams import QParams
from qat_lightning.modes.lowering.int8.transposed import Int8Transposed
from qat_lightning.modes.lowering.int8.weights import FloatLayer, Rounding, StoredWeight
from qat_lightning.modes.lowering.reference import QuantizeDequantize, ReferenceLayer, ReferenceWeight

_FUNCTIONS: dict[Any, int | None] = {F.linear: None, F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
"""Layers that are functions, with the number of dimensions of a convolution."""


def qparams_of(rounding: QuantizeDequantize) -> QParams:
    """Returns the qparams of a rounding, which are per-tensor, as those of unsigned bytes."""
    shift = 128 if rounding.dtype == torch.int8 else 0
    low, high = rounding.bounds
    return QParams(rounding.scale, int(rounding.zero_point) + shift, low + shift, high + shift)


def int8_layer(
    writer: Writer, node: fx.Node, relu: bool, input: QParams, output: QParams | None
) -> Int8Layer | None:
    """Returns a layer on bytes; None if a node calls something else, or if integers cannot compute it.

    Args:
        writer: The new graph.
        node: A node of the reference graph.
        relu: Whether a ReLU follows it.
        input: Qparams of the input.
        output: Qparams of the result; None for a float result.
    """
    module = module_of(writer.reference, node)
    geometry, pad = None, None
    if isinstance(module, ReferenceLayer):
        layer, relu = module.layer, relu or module.relu
        transposed = layer if isinstance(layer, ConvTranspose) else None
        weight = _weight(module.weight, None, layer.bias, transposed)
        if transposed is not None and weight is not None:
            return Int8Transposed(weight, _without_bias(layer), relu, input, output)
        if isinstance(layer, Convolution):
            geometry, pad = _geometry_of(layer, input)
        elif not isinstance(layer, nn.Linear):
            return None
    elif node.target in _FUNCTIONS:
        weight, geometry = _weight_of_call(writer, node), _geometry_of_call(node)
        if geometry is None and node.target is not F.linear:
            return None
    else:
        return None
    return None if weight is None else Int8Layer(weight, geometry, relu, input, output, pad)


def sizes(writer: Writer, node: fx.Node) -> tuple[Any, ...]:
    """Returns what a layer is called with beside its input: the size of a transposed convolution."""
    return fx.map_arg(node.args[1:], writer.value) if node.op == "call_module" else ()


def float_layer(reference: ReferenceLayer) -> FloatLayer:
    """Returns a layer that computes with floats."""
    return FloatLayer(reference.layer, stored_weight(reference.weight), reference.relu)


def stored_weight(reference: ReferenceWeight) -> StoredWeight:
    """Returns a weight that is read as floats."""
    integers: Any = reference.int8
    shape = [1] * integers.ndim
    if reference.axis is not None:
        shape[reference.axis] = -1
    scale, zero_point = _tensors(reference)
    return StoredWeight(integers, scale.view(shape), zero_point.view(shape))


def rounding_of(reference: QuantizeDequantize) -> Rounding:
    """Returns a rounding with a scale for each channel."""
    assert reference.axis is not None
    return Rounding(*_tensors(reference), reference.axis, reference.bounds)


def _tensors(reference: QuantizeDequantize) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a scale and a zero point as tensors."""
    zero_point: Any = reference.zero_point
    return torch.as_tensor(reference.scale, dtype=torch.float32), torch.as_tensor(zero_point)


def _weight(
    stored: Any, value: torch.Tensor | None, bias: torch.Tensor | None, layer: Any = None
) -> Weight | None:
    """Returns a weight as integers; None if it is not symmetric with a scale for each output channel.

    Args:
        stored: Its rounding.
        value: The weight, if the rounding does not hold it.
        bias: The bias of the layer.
        layer: The layer, if it is a transposed convolution.
    """
    if stored.dtype != torch.int8 or not stored.symmetric:
        return None
    integers = stored.int8 if value is None else stored.quantize(value.float())
    scale = _tensors(stored)[0]
    if layer is not None:
        scales = _scale_of_channels(layer, scale, stored.axis)
    else:
        scales = scale.expand(len(integers)).contiguous() if stored.axis in (None, 0) else None
    return (
        None if scales is None else Weight(integers, scales, None if bias is None else bias.detach().float())
    )


def _scale_of_channels(layer: Any, scale: torch.Tensor, axis: int | None) -> torch.Tensor | None:
    """Returns a scale for each output channel of a transposed convolution; None if they have none each."""
    if axis is None:
        return scale.expand(layer.out_channels).contiguous()
    if layer.groups == 1:
        return scale if axis == 1 else None
    groups = scale.view(layer.groups, -1)[:, :1]  # a group has its scale once for each of its input channels
    return groups.expand(-1, layer.out_channels // layer.groups).flatten() if axis == 0 else None


def _without_bias(layer: Any) -> nn.Module:
    """Returns a copy of a layer that has no weight already."""
    made = copy.deepcopy(layer)
    made.bias = None
    return made  # type: ignore[no-any-return]


def _weight_of_call(writer: Writer, node: fx.Node) -> Weight | None:
    """Returns the weight of a layer that is a function; None if it depends on an input of the network."""
    _, weight, bias = arguments(node, "input", "weight", "bias")[:3]
    stored = module_of(writer.reference, weight) if isinstance(weight, fx.Node) else None
    if not isinstance(stored, QuantizeDequantize):
        return None
    holds_it = isinstance(stored, ReferenceWeight)
    value = None if holds_it else writer.constants.of(weight.all_input_nodes[0])
    constant = writer.constants.of(bias) if isinstance(bias, fx.Node) else None
    depends = (value is None and not holds_it) or (bias is not None and constant is None)
    return None if depends else _weight(stored, value, constant)


def _geometry_of(layer: Any, input: QParams) -> tuple[Geometry, nn.Module | None]:
    """Returns how a convolution moves, and what pads its input before, if integers cannot pad like it."""
    sides = _sides(layer)
    by_kernel = layer.padding_mode == "zeros" and all(left == right for left, right in sides)
    padding = [left for left, _ in sides] if by_kernel else [0] * len(sides)
    geometry = Geometry([*layer.stride], padding, [*layer.dilation], layer.groups)
    if by_kernel:
        return geometry, None
    pads = [size for side in reversed(sides) for size in side]
    zeros = layer.padding_mode == "zeros"
    return geometry, ZeroPad(pads, input) if zeros else PadValues(pads, layer.padding_mode)


def _sides(layer: Any) -> list[tuple[int, int]]:
    """Returns how much a convolution pads before and after each dimension."""
    if not isinstance(layer.padding, str):
        return [(size, size) for size in layer.padding]
    if layer.padding == "valid":
        return [(0, 0) for _ in layer.kernel_size]
    totals = (d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return [(total // 2, total - total // 2) for total in totals]


def _geometry_of_call(node: fx.Node) -> Geometry | None:
    """Does the same for a function."""
    dims = _FUNCTIONS[node.target]
    if dims is None:
        return None
    settings = arguments(
        node, "input", "weight", "bias", ("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)
    )[3:]
    if any(isinstance(each, fx.Node | str) for each in settings):
        return None
    *places, groups = settings
    stride, padding, dilation = ([each] * dims if isinstance(each, int) else [*each] for each in places)
    return Geometry(stride, padding, dilation, groups)
