"""Counts what is in an int8 network: int8, fused and float layers, float operations, multiply-adds."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from qat_lightning.analysis.preflight.network_report import Finding
from qat_lightning.base.inputs import Inputs
from qat_lightning.base.nested import map_tensors
from qat_lightning.base.torch_internals import Convolution, ConvTranspose, attention_on_cpu
from qat_lightning.modes.graph.graft import graphs
from qat_lightning.modes.graph.lines import stack_line
from qat_lightning.modes.graph.nodes import module_of
from qat_lightning.modes.graph.relu6 import is_inside
from qat_lightning.modes.layers.trained_layer import TrainedLayer
from qat_lightning.modes.lowering.int8.edges import Dequantize
from qat_lightning.modes.lowering.int8.state import Lowered
from qat_lightning.quantize.floating import is_int8
from qat_lightning.quantize.recipe import Recipe

_WEIGHTED = (Convolution, nn.Linear)
_NO_INT8_TRAINING = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, ConvTranspose)
_BATCH_NORM = "BatchNorm"
_NOT_COUNTED_BY_TORCH = {attention_on_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}


class Work(NamedTuple):
    """The multiply-adds of one forward pass, for each layer with weights and in total."""

    layers: dict[str, int]
    total: int


def count_work(network: nn.Module, inputs: Inputs) -> Work:
    """Counts multiply-adds in one forward pass. Those of attention are only in the total."""
    macs: Counter[str] = Counter()

    def note(name: str) -> Any:
        def count(module: Any, args: Any, output: torch.Tensor) -> None:
            transposed = isinstance(module, ConvTranspose)
            elements = args[0].numel() if transposed else output.numel()
            macs[name] += elements * module.weight[0].numel()

        return count

    handles = [
        module.register_forward_hook(note(name))
        for name, module in network.named_modules()
        if isinstance(module, _WEIGHTED)
    ]
    # Copies: a validation's own tensors cannot be saved for a gradient.
    inputs = type(inputs)(*map_tensors(tuple(inputs), torch.clone))
    # Keep gradients on: without them the counter fails if a parameter is an input, and misses attention.
    with FlopCounterMode(display=False, custom_mapping=_NOT_COUNTED_BY_TORCH) as counter:
        network(*inputs.args, **inputs.kwargs)
    for handle in handles:
        handle.remove()
    return Work(dict(macs), max(counter.get_total_flops() // 2, sum(macs.values())))


def fused_layers(prepared: nn.Module) -> dict[str, int]:
    """Counts the fused layers of each kind."""
    kinds = Counter(map(parts, prepared.modules()))
    return {kind: count for kind, count in kinds.most_common() if "+" in kind}


def parts(module: nn.Module) -> str:
    """Names the modules in a prepared layer: `Conv2d+BatchNorm2d+ReLU`."""
    if not isinstance(module, TrainedLayer):
        return type(module).__name__.replace("BNReLU", "BatchNorm+ReLU")
    norm = getattr(module, "bn", None)
    norms = [type(norm).__name__] if norm is not None else []
    return "+".join([module.plain.__name__, *norms, *(["ReLU"] if module.relu else [])])


def layers(
    prepared: nn.Module, int8: nn.Module, recipe: Recipe, work: Work, lines: dict[str, str]
) -> tuple[list[str], list[Finding]]:
    """Returns the names of the int8 layers, and the layers and blocks with weights that stay float."""
    converted = dict(int8.named_modules())
    quantized, found = [], []
    blocks: list[str] = []
    for name, module in prepared.named_modules():
        if is_inside(name, tuple(blocks)) or not isinstance(module, (*_WEIGHTED, *_NO_INT8_TRAINING)):
            continue
        if name in converted and is_int8(converted[name]):
            quantized.append(name)
            continue
        blocks.append(name)
        macs = sum(value for layer, value in work.layers.items() if is_inside(layer, (name,)))
        why = _why_float(name, module, recipe)
        found.append(Finding(name, type(module).__name__, why, lines.get(name, "not called"), macs))
    return quantized, found


def _why_float(name: str, module: nn.Module, recipe: Recipe) -> str:
    for part in recipe.untraceable:
        path, _, line = part.partition(" ")
        if is_inside(name, (path,)):
            return f"{path} cannot be traced {line}"
    if is_inside(name, recipe.keep_float):
        return "keep_float"
    if hasattr(module, "weight_fake_quant"):
        return "its input or its output is not int8, or PyTorch has no int8 kernel for it"
    if isinstance(module, _NO_INT8_TRAINING):
        return f"PyTorch has no int8 training for {type(module).__name__}"
    return "its qconfig leaves it float, or a module around it runs as one float block"


def batch_norms(int8: nn.Module, lines: dict[str, str]) -> list[Finding]:
    """Returns the batch-norms that were not fused."""
    return [
        Finding(name, type(module).__name__, _why_unfused(module), lines.get(name, "not called"))
        for name, module in int8.named_modules()
        if _BATCH_NORM in type(module).__name__ or type(module).__name__.startswith("BNReLU")
    ]


def _why_unfused(module: nn.Module) -> str:
    return "an int8 layer of its own" if is_int8(module) else "float"


def float_ops(int8: nn.Module) -> list[Finding]:
    """Returns the float operations between int8 operations in the graphs of an int8 network."""
    return [finding for module, graph in graphs(int8) for finding in _float_ops_of(module, graph)]


def _float_ops_of(module: nn.Module, graph: fx.Graph) -> Iterator[Finding]:
    nodes = graph.nodes
    quantizes, dequantizes = partial(_quantizes, module), partial(_dequantizes, module)
    after = _reach([n for n in nodes if _makes_floats(module, n)], lambda n: n.users, quantizes)
    before = _reach([n for n in nodes if quantizes(n)], lambda n: n.all_input_nodes, dequantizes)
    for node in nodes:
        computes = not (quantizes(node) or dequantizes(node) or node.target is operator.getitem)
        if node in after and node in before and computes:
            yield Finding(node.name, _kind(module, node), "has no int8 form", stack_line(node))


def _reach(start: list[fx.Node], following: Any, stops: Any) -> set[fx.Node]:
    """Returns the nodes reachable from `start` without passing a stop node."""
    found: set[fx.Node] = set()
    waiting = [n for node in start for n in following(node)]
    while waiting:
        node = waiting.pop()
        if node not in found and not stops(node):
            found.add(node)
            waiting += following(node)
    return found


def _quantizes(module: nn.Module, node: fx.Node) -> bool:
    return node.target is torch.quantize_per_tensor or isinstance(module_of(module, node), Lowered)


def _dequantizes(module: nn.Module, node: fx.Node) -> bool:
    return _makes_floats(module, node) or node.op in ("placeholder", "get_attr")


def _makes_floats(module: nn.Module, node: fx.Node) -> bool:
    called = module_of(module, node)
    return node.target == "dequantize" or isinstance(called, Dequantize) or getattr(called, "is_float", False)


def _kind(module: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
