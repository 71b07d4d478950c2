"""Where training overwrites what a layer made, so that little more memory is needed than in float training.

A float network keeps one tensor for each layer and each ReLU. Plain fake-quantization adds the input of every
rounding, and behind a ReLU the ReLU's own copy of its result. Where the fake-quantize is the tensor's one
reader, it rounds in place, and ReLU and rounding keep a byte for each element.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.fake_quant.fake_quantize import FakeQuantize
from qat_lightning.fake_quant.numerics import rectify
from qat_lightning.modes.graph.nodes import module_of
from qat_lightning.modes.layers.fused_conv_bn import FusedConvBn


def round_in_place(prepared: nn.Module) -> None:
    """Lets fake-quantizes overwrite what they alone read, in place, in a prepared eager network or graph."""
    if isinstance(prepared, fx.GraphModule):
        _rectify_relus(prepared)
        readers = _sole_readers(prepared)
    else:
        layers: list[Any] = [m for m in prepared.modules() if _keeps_its_rounding(m)]
        readers = [layer.activation_post_process for layer in layers]
    for fake_quantize in readers:
        if isinstance(fake_quantize, FakeQuantize):
            fake_quantize.in_place = True


def restore_relus(prepared: fx.GraphModule) -> None:
    """Puts plain ReLUs back into a graph, in place, which torch.ao's convert knows."""
    for node in prepared.graph.nodes:
        if node.target is rectify:
            node.target, node.kwargs = F.relu, {}
    prepared.recompile()


def _rectify_relus(graph_module: fx.GraphModule) -> None:
    """Makes each ReLU whose one reader is a fake-quantize save a byte for each element."""
    for node in graph_module.graph.nodes:
        module = module_of(graph_module, node)
        is_relu = type(module) is nn.ReLU or node.target is F.relu
        if is_relu and _sole_reader(graph_module, node) is not None:
            in_place = bool(getattr(module, "inplace", False) or node.kwargs.get("inplace"))
            node.op, node.target = "call_function", rectify
            node.args, node.kwargs = node.args[:1], {"in_place": in_place}
    graph_module.recompile()


def _sole_readers(graph_module: fx.GraphModule) -> list[FakeQuantize]:
    """The fake-quantizes that, wherever the graph calls them, alone read what nobody needs for a gradient."""
    calls: dict[FakeQuantize, list[bool]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        fake_quantize = module_of(graph_module, node)
        if isinstance(fake_quantize, FakeQuantize):
            source = node.all_input_nodes[0]
            replaceable = source.target is rectify or isinstance(module_of(graph_module, source), FusedConvBn)
            calls[fake_quantize].append(replaceable and len(source.users) == 1)
    return [fake_quantize for fake_quantize, replaceable in calls.items() if all(replaceable)]


def _sole_reader(graph_module: fx.GraphModule, node: fx.Node) -> FakeQuantize | None:
    reader = module_of(graph_module, next(iter(node.users))) if len(node.users) == 1 else None
    return reader if isinstance(reader, FakeQuantize) else None


def _keeps_its_rounding(module: nn.Module) -> bool:
    """Whether an eager layer's output goes to its fake-quantize, by a hook, and nowhere else."""
    return isinstance(module, FusedConvBn) and len(module._forward_hooks) == 1
