"""Which fake-quantizes belong to a layer: its weight's, and those that round what it returns."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from qat_lightning.fake_quant.fake_quantize import FakeQuantizeBase
from qat_lightning.modes.graph.graft import graphs
from qat_lightning.modes.graph.nodes import fake_quantize_of, module_of


def layer_fake_quantizes(prepared: nn.Module) -> dict[str, frozenset[FakeQuantizeBase]]:
    """The fake-quantizes of each layer with weights, by the layer's name, in a prepared network.

    One that layers share, such as those of a concatenation, belongs to each. Those of the network's inputs
    and of operations with several operands belong to none.
    """
    names = {module: name for name, module in prepared.named_modules() if _is_layer(module)}
    found: dict[nn.Module, set[FakeQuantizeBase]] = {layer: set(_own(layer)) for layer in names}
    for owner, graph in graphs(prepared):
        for node in graph.nodes:
            layer = module_of(owner, node)
            if layer in found:
                found[layer].update(_readers(owner, node))
    return {name: frozenset(found[layer]) for layer, name in names.items()}


def _is_layer(module: nn.Module | None) -> bool:
    return hasattr(module, "weight_fake_quant")


def _own(layer: nn.Module) -> Iterator[FakeQuantizeBase]:
    """Its weight's, and in eager mode the one that a hook calls with its output."""
    for name in ("weight_fake_quant", "activation_post_process"):
        grid = getattr(layer, name, None)
        if isinstance(grid, FakeQuantizeBase):
            yield grid


def _readers(owner: nn.Module, node: fx.Node) -> Iterator[FakeQuantizeBase]:
    """The first fake-quantizes after `node`, past what only transforms the one tensor: ReLU, dropout."""
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        grid = fake_quantize_of(owner, user)
        if grid is not None:
            yield grid
        elif len(user.all_input_nodes) == 1 and user.op != "output" and not _is_layer(module_of(owner, user)):
            waiting += user.users
