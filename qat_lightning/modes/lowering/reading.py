"""Reads a reference graph: makes operations on bytes of its modules."""

from __future__ import annotations

from typing import Any

import torch

from qat_lightning.base.torch_internals import Convolution
from qat_lightning.modes.lowering.int8.layers import Geometry, Int8Layer, Weight
from qat_lightning.modes.lowering.int8.qparams import QParams
from qat_lightning.modes.lowering.int8.weights import FloatLayer, Rounding, StoredWeight
from qat_lightning.modes.lowering.reference import QuantizeDequantize, ReferenceLayer, ReferenceWeight


def qparams_of(rounding: QuantizeDequantize) -> QParams | None:
    """Returns the qparams of a rounding as those of unsigned bytes; None for per-channel ones."""
    if rounding.axis is not None:
        return None
    shift = 128 if rounding.dtype == torch.int8 else 0
    low, high = rounding.bounds
    return QParams(rounding.scale, int(rounding.zero_point) + shift, low + shift, high + shift)


def int8_layer(
    reference: ReferenceLayer, relu: bool, input: QParams, output: QParams | None
) -> Int8Layer | None:
    """Returns a layer on bytes; None if integers cannot compute it.

    Args:
        reference: The layer of the reference graph.
        relu: Whether a ReLU follows it.
        input: Qparams of the input.
        output: Qparams of the result; None for a float result.
    """
    weight, layer = _weight_of(reference), reference.layer
    relu = relu or reference.relu
    if weight is None:
        return None
    if not isinstance(layer, Convolution):
        return Int8Layer(weight, None, relu, input, output)
    padding = _padding(layer)
    if layer.padding_mode != "zeros" or padding is None:
        return None
    geometry = Geometry([*layer.stride], padding, [*layer.dilation], layer.groups)
    return Int8Layer(weight, geometry, relu, input, output)


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


def _weight_of(reference: ReferenceLayer) -> Weight | None:
    """Returns the weight of a layer; None if it is not symmetric with a scale for each output channel."""
    stored: Any = reference.weight
    scale, zero_point = _tensors(stored)
    if stored.dtype != torch.int8 or stored.axis not in (None, 0) or bool(zero_point.any()):
        return None
    bias = reference.layer.bias
    scales = scale.expand(len(stored.int8)).contiguous()
    return Weight(stored.int8, scales, None if bias is None else bias.detach().float())


def _padding(layer: Any) -> list[int] | None:
    """Returns how much a convolution pads on each side; None if the sides differ."""
    if not isinstance(layer.padding, str):
        return [*layer.padding]
    totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "valid":
        return [0] * len(totals)
    return None if any(total % 2 for total in totals) else [total // 2 for total in totals]
