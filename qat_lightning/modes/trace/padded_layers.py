"""Splits convolutions that int8 kernels cannot pad for: a padding of its own, and a convolution without.

PyTorch's int8 convolutions pad with zeros; those of one and two dimensions also reflect.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from qat_lightning.modes.functions.pads import pad_values
from qat_lightning.modes.graph.nodes import module_of
from qat_lightning.modes.trace.functional import padding_of_same
from qat_lightning.modes.trace.own_layers import layer_with

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def pads_by_itself(module: Any) -> bool:
    """Whether `module` is a convolution of torch.nn with a padding that int8 kernels do not support."""
    if type(module) not in _KINDS or module.padding_mode == "zeros":
        return False
    return type(module) is nn.Conv3d or module.padding_mode != "reflect"


def split_padded_layers(graph_module: fx.GraphModule, scopes: dict[str, Any]) -> None:
    """Puts a padding before each call of such a convolution, in place.

    The convolution itself is replaced by one without padding that shares its parameters.

    Args:
        graph_module: A traced network.
        scopes: The scopes of its nodes. Those of the paddings are added: they belong to the convolutions.
    """
    unpadded: dict[nn.Module, nn.Module] = {}
    for node in list(graph_module.graph.nodes):
        layer = module_of(graph_module, node)
        if not pads_by_itself(layer):
            continue
        (x,) = node.all_input_nodes
        with graph_module.graph.inserting_before(node):
            pad = graph_module.graph.call_function(pad_values, (x, _pads(layer), layer.padding_mode))
        pad.meta = dict(node.meta)
        scopes[pad.name] = (str(node.target), type(layer))
        node.args, node.kwargs = (pad,), {}
        unpadded[layer] = _unpadded(layer)
    for name, module in list(graph_module.named_modules(remove_duplicate=False)):
        if module in unpadded:
            graph_module.set_submodule(name, unpadded[module])
    graph_module.recompile()


def _pads(layer: Any) -> tuple[int, ...]:
    """Returns the padding of a convolution as `F.pad` takes it: the last dimension first, both sides."""
    if isinstance(layer.padding, str):
        totals = padding_of_same(layer)
        sides = (
            [(total // 2, total - total // 2) for total in totals]
            if layer.padding == "same"
            else [(0, 0)] * len(totals)
        )
    else:
        sides = [(pad, pad) for pad in layer.padding]
    return tuple(pad for both in reversed(sides) for pad in both)


def _unpadded(layer: Any) -> nn.Module:
    """Returns a convolution without padding that shares the parameters of `layer`."""
    settings = layer.stride, 0, layer.dilation, layer.groups
    return layer_with(type(layer), layer.weight, layer.bias, *settings).train(layer.training)
