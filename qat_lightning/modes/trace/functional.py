"""Rewrites functional convolutions and linear layers in a graph to the form that torch.ao understands."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.base.torch_internals import TRANSPOSED

DIMENSIONS: dict[Any, int] = {
    F.linear: 0,
    F.conv1d: 1,
    F.conv2d: 2,
    F.conv3d: 3,
    **{function: dims for dims, function in TRANSPOSED.items()},
}
"""The functions with a weight, and their number of dimensions."""
_TENSORS: dict[str, Any] = dict.fromkeys(("input", "weight", "bias"))
_CONVOLUTION = {**_TENSORS, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_TRANSPOSED = {**_TENSORS, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
_PER_DIMENSION = ("stride", "padding", "output_padding", "dilation")


def write_out_arguments(graph: fx.Graph) -> None:
    """Gives each functional convolution and linear layer all of its arguments, by position, in place."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in DIMENSIONS:
            continue
        defaults = _defaults(node.target)
        given = {**defaults, **dict(zip(defaults, node.args, strict=False)), **node.kwargs}
        for name in set(_PER_DIMENSION) & given.keys():
            given[name] = _each(given[name], DIMENSIONS[node.target])
        node.args, node.kwargs = tuple(given.values()), {}
        computed = isinstance(given["bias"], fx.Node) and not _is_read(given["bias"])
        if computed and not reads_rows(node):
            stay_float(node)


def _defaults(function: Any) -> dict[str, Any]:
    """Returns the arguments of a function with a weight, in order, with their defaults."""
    if function is F.linear:
        return _TENSORS
    return _TRANSPOSED if function in TRANSPOSED.values() else _CONVOLUTION


def _is_read(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


Rows = tuple[int | None, int | None]
"""The first row of a parameter, and the one after the last; None if there is no limit."""
ALL_ROWS: Rows = (None, None)


def reads_rows(node: fx.Node) -> bool:
    """Whether a node calls `F.linear` with rows of stored tensors, such as `self.weight[:8]`, or all rows."""
    weight, bias = node.args[1:3]
    given = [weight] if bias is None else [weight, bias]
    return node.target is F.linear and all(rows_of(value) is not None for value in given)


def rows_of(value: Any) -> tuple[fx.Node, Rows] | None:
    """Returns the read of a stored tensor, and which of its rows `value` is; None if it is anything else."""
    if _is_read(value):
        return value, ALL_ROWS
    if not isinstance(value, fx.Node) or value.target is not operator.getitem:
        return None
    read, key = value.args
    if not _is_read(read) or not isinstance(key, slice) or key.step is not None:
        return None
    start, stop = key.start, key.stop
    plain = isinstance(start, int | None) and isinstance(stop, int | None)
    return (read, (start, stop)) if plain else None  # type: ignore[return-value]


def stay_float(node: fx.Node) -> None:
    """Makes the call of a functional convolution or linear layer one that int8 does not know, in place.

    It knows no transposed ones.
    """
    if node.target not in TRANSPOSED.values():
        node.target = linear if node.target is F.linear else convolution


def linear(*args: Any) -> torch.Tensor:
    """Does the same as `F.linear`, but stays float: int8 would store what is computed here."""
    return F.linear(*args)


def convolution(x: torch.Tensor, *args: Any) -> torch.Tensor:
    """Does the same as a functional convolution, but stays float, for the same reason."""
    weight, bias, stride, padding, dilation, groups = args
    transposed, output_padding = False, [0] * (x.ndim - 2)
    return torch.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


def _each(value: Any, dimensions: int) -> Any:
    return (value,) * dimensions if isinstance(value, int) else value


def write_out_padding(network: nn.Module) -> list[str]:
    """Replaces the padding `"same"` or `"valid"` of convolutions by numbers, in place.

    Returns:
        Names of the convolutions where `"same"` pads one side more than the other, which int8 kernels do not
        support.
    """
    uneven = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and isinstance(module.padding, str):
            totals = padding_of_same(module)
            if module.padding == "valid":
                module.padding = (0,) * len(totals)
            elif all(total % 2 == 0 for total in totals):
                module.padding = tuple(total // 2 for total in totals)
            else:
                uneven.append(name)
    return uneven


def padding_of_same(layer: Any) -> list[int]:
    """Returns how many elements the padding `"same"` adds in each dimension, on both sides together."""
    return [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]


def read_metadata_from_buffers(network: nn.Module, graph: fx.Graph) -> None:
    """Makes a graph read the shape, device and dtype of weights from buffers without content, in place.

    It could not read them from an int8 layer, whose weight is not a tensor attribute.
    """
    for node in list(graph.nodes):
        readers = [user for user in node.users if _reads_metadata(user)]
        if node.op != "get_attr" or "." not in str(node.target) or not readers:
            continue
        weight = attribute(network, str(node.target))
        if isinstance(weight, torch.Tensor):
            name = f"{node.name}_facts"
            network.register_buffer(name, weight.new_empty(()).expand(weight.shape), persistent=False)
            with graph.inserting_before(node):
                facts = graph.create_node("get_attr", name)
            for reader in readers:
                reader.replace_input_with(node, facts)
            if not node.users:
                graph.erase_node(node)


def _reads_metadata(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.target is getattr and node.args[1] in ("shape", "ndim", "device", "dtype")


def attribute(network: nn.Module, name: str) -> Any:
    """Returns the attribute of a network, or of a module inside it, with that path."""
    owner, _, leaf = name.rpartition(".")
    return getattr(network.get_submodule(owner), leaf)
