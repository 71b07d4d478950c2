"""Lowers a reference graph: floats between a dequantize and a quantize become operations on bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from qat_lightning.fake_quant.numerics import rectify
from qat_lightning.modes.functions.pads import pad_values
from qat_lightning.modes.graph.nodes import module_of
from qat_lightning.modes.lowering.graph import Writer
from qat_lightning.modes.lowering.moves import moved_bytes, pad_values_of, reads_shape
from qat_lightning.modes.lowering.reading import (
    float_layer,
    int8_layer,
    rounding_of,
    sizes,
    stored_weight,
)
from qat_lightning.modes.lowering.reference import QuantizeDequantize, ReferenceLayer, ReferenceWeight
from qat_lightning.modes.lowering.roundings import name_of, rounded_bytes


@torch.no_grad()
def lower(reference_graph: fx.GraphModule) -> fx.GraphModule:
    """Makes an int8 network on plain tensors from a reference graph.

    It computes what the reference graph computes. Integers flow between its operations as bytes with a scale
    and a zero point; operations without an integer form compute with floats.

    Args:
        reference_graph: The result of :func:`qat_lightning.modes.lowering.reference.reference` for a network
            of fx mode.

    Returns:
        An `fx.GraphModule` in eval mode, on the CPU.
    """
    writer = Writer(reference_graph)
    for node in reference_graph.graph.nodes:
        writer.meta = dict(node.meta)
        _write(writer, node)
    return writer.finish(type(reference_graph).__name__)


def _write(writer: Writer, node: fx.Node) -> None:
    module = module_of(writer.reference, node)
    if type(module) is QuantizeDequantize and module.axis is None:
        writer.bytes[node] = rounded_bytes(writer, node, module)
    elif (moved := moved_bytes(writer, node)) is not None:
        writer.bytes[node] = moved
    else:
        writer.set_value(node, _float_value(writer, node, module))


def _float_value(writer: Writer, node: fx.Node, module: Any) -> fx.Node:
    """Writes a node that no integers compute, or whose result is float."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    integers = writer.bytes.get(source) if source is not None else None
    if (
        integers is not None
        and (layer := int8_layer(writer, node, False, integers.qparams, None)) is not None
    ):
        return writer.call(name_of(node), layer, integers.node, *sizes(writer, node))
    if isinstance(module, ReferenceLayer) and source is not None:
        return writer.call(str(node.target), float_layer(module), writer.value(source), *sizes(writer, node))
    if isinstance(module, ReferenceWeight):
        return writer.call(str(node.target), stored_weight(module))
    if isinstance(module, QuantizeDequantize):
        return writer.call(str(node.target), rounding_of(module), writer.value(node.all_input_nodes[0]))
    if node.target is pad_values:
        return writer.call(node.name, pad_values_of(node), writer.value(node.all_input_nodes[0]))
    copied = writer.copy(node, of_bytes=reads_shape(node))
    if node.target is rectify:  # saves memory in training
        copied.target, copied.kwargs = F.relu, {}
    return copied
