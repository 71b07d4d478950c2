"""What becomes of a rounding: what lies between it and the bytes before it becomes one operation on bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qat_lightning.modes.graph.nodes import call_target, module_of
from qat_lightning.modes.lowering.functions import ADDITIONS, PRODUCTS, RELUS, is_elementwise, is_pair
from qat_lightning.modes.lowering.graph import Bytes, Writer
from qat_lightning.modes.lowering.int8.arithmetic import Product, Sum
from qat_lightning.modes.lowering.int8.edges import Quantize
from qat_lightning.modes.lowering.int8.pools import Average
from qat_lightning.modes.lowering.int8.qparams import QParams
from qat_lightning.modes.lowering.norms import norm_of, table_of
from qat_lightning.modes.lowering.pooling import average_of
from qat_lightning.modes.lowering.reading import int8_layer, qparams_of, sizes
from qat_lightning.modes.lowering.reference import QuantizeDequantize, ReferenceLayer


def rounded_bytes(writer: Writer, node: fx.Node, rounding: QuantizeDequantize) -> Bytes:
    """Writes the operation whose result a rounding rounds.

    Args:
        writer: The new graph.
        node: The call of the rounding.
        rounding: The module that it calls.
    """
    (source,) = node.all_input_nodes
    same = writer.bytes.get(source)
    if same is not None and same.rounding is rounding:
        return same
    output = qparams_of(rounding)
    writer.meta = dict(source.meta)
    for rule in (_table, _layer, _pair, _average):
        written = rule(writer, source, output)
        if written is not None:
            return Bytes(written, output, rounding)
    averaged = bool(node.kwargs.get("averaged"))
    quantize = Quantize(output, channels_last=_is_convolved(writer, node), averaged=averaged)
    return Bytes(writer.call(str(node.target), quantize, writer.value(source)), output, rounding)


def _table(writer: Writer, node: fx.Node, output: QParams) -> fx.Node | None:
    """Looks up functions of one tensor of bytes; none, if only the qparams change."""
    chain: list[fx.Node] = []
    norms: list[Any] = []
    start = node
    while start not in writer.bytes:
        norm = norm_of(module_of(writer.reference, start))
        if norm is not None:
            norms.append(norm)
        elif not is_elementwise(call_target(writer.reference, start), start):
            return None
        chain.insert(0, start)
        (start,) = start.all_input_nodes
    source = writer.bytes[start]

    def function(x: torch.Tensor) -> torch.Tensor:
        for each in chain:
            x = _run(writer.reference, each, x)
        return x

    made = table_of(function, norms, source.qparams, output)
    return None if made is None else writer.call(name_of(node), made, source.node)


def _layer(writer: Writer, node: fx.Node, output: QParams) -> fx.Node | None:
    """Computes a layer with bytes, and a ReLU after it."""
    layer, relu = _before_relu(writer, node)
    integers = writer.bytes.get(layer.all_input_nodes[0]) if layer.all_input_nodes else None
    if integers is None or not _is_read_once(node, layer) or not output.full:
        return None
    written = int8_layer(writer, layer, relu, integers.qparams, output)
    if written is None:
        return None
    return writer.call(name_of(layer), written, integers.node, *sizes(writer, layer))


def _pair(writer: Writer, node: fx.Node, output: QParams) -> fx.Node | None:
    """Adds two tensors of bytes, with a ReLU after it, or multiplies them."""
    pair, relu = _before_relu(writer, node)
    sources = [writer.bytes.get(source) for source in pair.args if isinstance(source, fx.Node)]
    first, second = sources if len(sources) == 2 else (None, None)
    if first is None or second is None or not _is_read_once(node, pair) or not output.full:
        return None
    target = call_target(writer.reference, pair)
    module: Any
    if is_pair(target, pair, ADDITIONS):
        module = Sum(first.qparams, second.qparams, output, relu)
    elif is_pair(target, pair, PRODUCTS) and not relu:
        module = Product(first.qparams, second.qparams, output)
    else:
        return None
    return writer.call(name_of(pair), module, first.node, second.node)


def _average(writer: Writer, node: fx.Node, output: QParams) -> fx.Node | None:
    """Averages bytes."""
    found = average_of(module_of(writer.reference, node) or node.target, node)
    integers = writer.bytes.get(node.all_input_nodes[0]) if node.all_input_nodes else None
    if found is None or integers is None:
        return None
    module = Average(found, integers.qparams, output)
    return writer.call(name_of(node), module, integers.node)


def _before_relu(writer: Writer, node: fx.Node) -> tuple[fx.Node, bool]:
    """Returns the operation before a ReLU and true, or `node` itself and false."""
    if call_target(writer.reference, node) in RELUS:
        return node.all_input_nodes[0], True
    return node, False


def _is_read_once(*nodes: fx.Node) -> bool:
    return all(len(node.users) == 1 for node in nodes)


def _is_convolved(writer: Writer, node: fx.Node) -> bool:
    """Whether a convolution reads a rounded tensor."""
    modules = [module_of(writer.reference, user) for user in node.users]
    weights = [m.weight.get_buffer("int8") for m in modules if isinstance(m, ReferenceLayer)]
    return any(weight.ndim > 3 for weight in weights)


def name_of(node: fx.Node) -> str:
    """Returns the name for a new module. That of a function may be that of a LightningModule's method."""
    return str(node.target) if node.op == "call_module" else f"{node.name}_int8"


def _run(reference: fx.GraphModule, node: fx.Node, x: torch.Tensor) -> torch.Tensor:
    """Runs what a node calls on `x`, in place of its only input."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: x)
    found: torch.Tensor = getattr(fx.Interpreter(reference), node.op)(node.target, args, kwargs)
    return found
