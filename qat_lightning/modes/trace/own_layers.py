"""Layers of torch.nn that share their parameters with what they stand for.

They replace functional calls inside user-defined layers, since torch.ao can fuse only layers.

An example is timm's `Conv2dSame`, which pads its input and calls `F.conv2d` with its own weight. torch.ao
fuses a batch-norm into a layer, but not into a function.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.base.torch_internals import ConvTranspose, modules_of, parameters_of
from qat_lightning.modes.trace.functional import Rows

LAYER_OF: dict[Any, type[nn.Module]] = {
    F.linear: nn.Linear,
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
}


def call_plain_layers(network: nn.Module, graph: fx.Graph) -> dict[str, nn.Module]:
    """Replaces each call of a function with the weight of a layer by a call of a torch.nn layer, in place.

    Args:
        network: The network that was traced. It is not changed.
        graph: Its graph, with all arguments of these calls written out.

    Returns:
        The torch.nn layers by name: the graph calls each by the name of the user-defined layer in `network`.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        owner = _owner(network, node)
        if owner is not None:
            calls.setdefault(owner, []).append(node)
    plain: dict[str, nn.Module] = {}
    for name, nodes in calls.items():
        settings = {node.args[3:] for node in nodes}
        if len(settings) == 1:
            layer: Any = network.get_submodule(name)
            kind = LAYER_OF[nodes[0].target]
            made = layer_with(kind, layer.weight, layer.bias, *settings.pop())
            plain[name] = made.train(layer.training)
            for node in nodes:
                parameters = [value for value in node.args[1:3] if isinstance(value, fx.Node)]
                node.op, node.target, node.args = "call_module", name, node.args[:1]
                for value in parameters:
                    if not value.users:
                        graph.erase_node(value)
    return plain


def _owner(network: nn.Module, node: fx.Node) -> str | None:
    """Returns the name of the layer whose weight and bias a function call uses, if it is of the same kind."""
    if node.op != "call_function" or node.target not in LAYER_OF:
        return None
    _, weight, bias = node.args[:3]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    name, _, leaf = str(weight.target).rpartition(".")
    layer: Any = network.get_submodule(name)
    if not name or leaf != "weight" or not isinstance(layer, LAYER_OF[node.target]) or modules_of(layer):
        return None
    own_bias = bias is None if layer.bias is None else _reads(bias, f"{name}.bias")
    return name if own_bias else None


def _reads(value: Any, name: str) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr" and value.target == name


def layer_with(kind: Any, weight: nn.Parameter, bias: nn.Parameter | None, *settings: Any) -> nn.Module:
    """Returns a layer of torch.nn that shares a weight and a bias.

    Args:
        kind: The layer's class.
        weight: Its weight.
        bias: Its bias, or None.
        *settings: Of a convolution: stride, padding, dilation and groups; of a transposed one: stride,
            padding, output padding, groups and dilation.
    """
    out_channels, channels, *kernel = weight.shape
    if kind is nn.Linear:
        layer: nn.Module = nn.Linear(channels, out_channels, device="meta")
    elif issubclass(kind, ConvTranspose):
        *places, groups, dilation = settings
        ends = out_channels, channels * groups  # the weight has the input channels first
        layer = kind(*ends, tuple(kernel), *places, groups, dilation=dilation, device="meta")
    else:
        *places, groups = settings
        layer = kind(channels * groups, out_channels, tuple(kernel), *places, groups, device="meta")
    parameters_of(layer).update(weight=weight, bias=bias)
    return layer


class RowLayer(nn.Module):
    """A layer whose weight and bias are rows of parameters that it shares with others.

    Attributes:
        whole_weight: The parameter that holds the weight.
        whole_bias: The parameter that holds the bias, or None.
        rows: Which rows are the weight, and which the bias.
    """

    whole_weight: nn.Parameter
    whole_bias: nn.Parameter | None
    rows: Sequence[Rows]

    @property
    def weight(self) -> torch.Tensor:
        """The rows that are the weight."""
        return self.whole_weight[slice(*self.rows[0])]

    @property
    def bias(self) -> torch.Tensor | None:
        """The rows that are the bias."""
        return None if self.whole_bias is None else self.whole_bias[slice(*self.rows[1])]


def linear_with_rows(weight: nn.Parameter, bias: nn.Parameter | None, rows: Sequence[Rows]) -> RowLayer:
    """Returns a linear layer of torch.nn with rows of a weight and of a bias.

    Args:
        weight: A parameter.
        bias: A parameter, or None.
        rows: Which of their rows.
    """
    out_channels, channels = weight[slice(*rows[0])].shape
    layer = nn.Linear(channels, out_channels, device="meta")
    return with_rows(layer, weight, bias, rows)


def with_rows(
    layer: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None, rows: Sequence[Rows]
) -> RowLayer:
    """Gives a layer rows of other parameters instead of its own, in place."""
    own: Any = parameters_of(layer)
    del own["weight"], own["bias"]
    own.update(whole_weight=weight, whole_bias=bias)
    row_layer: Any = layer
    row_layer.rows = rows
    row_layer.__class__ = _row_class(row_layer.__class__)
    return row_layer  # type: ignore[no-any-return]


def with_own_parameters(network: nn.Module) -> None:
    """Gives layers that share rows of parameters copies of these rows, and their classes back, in place."""
    for layer in network.modules():
        if isinstance(layer, RowLayer):
            own: Any = parameters_of(layer)
            trains, copies = layer.whole_weight.requires_grad, {}
            for name, rows in (("weight", layer.weight), ("bias", layer.bias)):
                copies[name] = None if rows is None else nn.Parameter(rows.detach().clone(), trains)
            del own["whole_weight"], own["whole_bias"], vars(layer)["rows"]
            layer.__class__ = type(layer).__bases__[1]
            own.update(copies)


@cache
def _row_class(kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (RowLayer, kind), {"__module__": kind.__module__})
