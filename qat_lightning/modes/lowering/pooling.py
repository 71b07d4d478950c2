"""Recognizes poolings."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.base.torch_internals import AdaptiveAvgPool, AvgPool
from qat_lightning.modes.lowering.graph import arguments
from qat_lightning.modes.lowering.int8.pools import MaxPool, Mean

_MAX_POOLS: dict[Any, int] = {
    kind: dims
    for dims, kinds in enumerate(
        (
            (nn.MaxPool1d, F.max_pool1d, torch.max_pool1d),
            (nn.MaxPool2d, F.max_pool2d, torch.max_pool2d),
            (nn.MaxPool3d, F.max_pool3d, torch.max_pool3d),
        ),
        start=1,
    )
    for kind in kinds
}
"""The number of dimensions by module or function."""
_WINDOW = ("kernel_size", "stride", ("padding", 0), ("ceil_mode", False), ("count_include_pad", True))
_AVERAGE_FUNCTIONS: dict[Any, tuple[Any, tuple[Any, ...]]] = {
    F.adaptive_avg_pool1d: (nn.AdaptiveAvgPool1d, ("output_size",)),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    F.adaptive_avg_pool3d: (nn.AdaptiveAvgPool3d, ("output_size",)),
    F.avg_pool1d: (nn.AvgPool1d, _WINDOW),
    F.avg_pool2d: (nn.AvgPool2d, (*_WINDOW, "divisor_override")),
    F.avg_pool3d: (nn.AvgPool3d, (*_WINDOW, "divisor_override")),
}
_SPATIAL: dict[Any, int] = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3}
_PARAMETERS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def max_pool_of(target: Any, node: fx.Node) -> MaxPool | None:
    """Returns the pooling that a node does, if it takes the largest value of each window; else None.

    Args:
        target: The module or the function that the node calls.
        node: The node.
    """
    dims = _MAX_POOLS.get(type(target) if isinstance(target, nn.Module) else target)
    if dims is None:
        return None
    if isinstance(target, nn.Module):
        found = [getattr(target, name) for name in _PARAMETERS]
    else:
        found = [*arguments(node, "input", "kernel_size", "stride", ("padding", 0), ("dilation", 1))[1:]]
        found += [node.args[5] if len(node.args) > 5 else node.kwargs.get("ceil_mode", False)]
        found += [node.args[6] if len(node.args) > 6 else node.kwargs.get("return_indices", False)]
    *sizes, ceil_mode, return_indices = found
    sizes[1] = sizes[1] or sizes[0]
    if ceil_mode or return_indices or any(isinstance(each, fx.Node) for each in sizes):
        return None
    return MaxPool(*[[each] * dims if isinstance(each, int) else [*each] for each in sizes])


def average_of(target: Any, node: fx.Node) -> Mean | nn.Module | None:
    """Returns what a node averages over; None if it does something else.

    Args:
        target: The module, the function or the name of the method that the node calls.
        node: The node.
    """
    if target in _AVERAGE_FUNCTIONS:
        kind, names = _AVERAGE_FUNCTIONS[target]
        found = arguments(node, "input", *names)[1:]
        constant = not any(isinstance(each, fx.Node) for each in found)
        target = kind(*found) if constant and len(node.all_input_nodes) == 1 else None
    if isinstance(target, AdaptiveAvgPool):
        dims = _SPATIAL[type(target)]
        whole = target.output_size in (1, (1,) * dims, [1] * dims)
        return Mean(range(-dims, 0), True) if whole else target
    if isinstance(target, AvgPool):
        return target
    if target not in ("mean", torch.mean) or len(node.all_input_nodes) > 1:
        return None
    _, dim, keepdim = arguments(node, "input", "dim", ("keepdim", False))
    if dim is None or set(node.kwargs) - {"input", "dim", "keepdim"} or len(node.args) > 3:
        return None
    return Mean([dim] if isinstance(dim, int) else dim, bool(keepdim))
