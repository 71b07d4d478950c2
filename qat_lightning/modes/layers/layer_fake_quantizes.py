"""Finds the fake-quantizes of each layer: its weight's, and those that round its output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from qat_lightning.fake_quant.switches import is_fake_quantize
from qat_lightning.modes.graph.graft import graphs
from qat_lightning.modes.graph.nodes import fake_quantize_of, module_of


def layer_fake_quantizes(prepared: nn.Module) -> dict[str, frozenset[nn.Module]]:
    """Maps the name of each layer with weights, in a prepared network, to the fake-quantizes of that layer.

    A fake-quantize that layers share, as before a concatenation, belongs to each of them. Those of the
    network's inputs and of operations with several operands belong to none.
    """
    names = {module: name for name, module in prepared.named_modules() if _is_layer(module)}
    found: dict[nn.Module, set[nn.Module]] = {layer: set(_attached(layer)) for layer in names}
    for owner, graph in graphs(prepared):
        for node in graph.nodes:
            layer = module_of(owner, node)
            if layer in found:
                found[layer].update(_next_fake_quantizes(owner, node))
    return {name: frozenset(found[layer]) for layer, name in names.items()}


def _is_layer(module: nn.Module | None) -> bool:
    return hasattr(module, "weight_fake_quant")


def _attached(layer: nn.Module) -> Iterator[nn.Module]:
    """Yields the fake-quantize of the weight, and in eager mode the one that a hook calls with the output."""
    for name in ("weight_fake_quant", "activation_post_process"):
        fake_quantize: Any = getattr(layer, name, None)
        if is_fake_quantize(fake_quantize):
            yield fake_quantize


def _next_fake_quantizes(owner: nn.Module, node: fx.Node) -> Iterator[nn.Module]:
    """Yields the first fake-quantizes after `node`, past operations with one operand, such as ReLU."""
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        fake_quantize = fake_quantize_of(owner, user)
        if fake_quantize is not None:
            yield fake_quantize
        elif len(user.all_input_nodes) == 1 and user.op != "output" and not _is_layer(module_of(owner, user)):
            waiting += user.users
