"""Operations that return values of their first argument: its qparams represent their result, too."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from qat_lightning.modes.functions.pads import pad_values
from qat_lightning.modes.graph.dropout import detached
from qat_lightning.modes.graph.nodes import RELUS

MOVES: frozenset[Any] = frozenset(
    {
        *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, *RELUS, StochasticDepth, detached, pad_values),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.pixel_shuffle, F.pixel_unshuffle),
        *(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.channel_shuffle, torch.narrow),
        *(torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze),
        *(torch.repeat_interleave, torch.roll, torch.flip, torch.chunk, torch.split, torch.unbind),
        *(torch.swapaxes, torch.movedim, torch.clone, operator.getitem),
        *("reshape", "view", "transpose", "permute", "squeeze", "unsqueeze", "contiguous", "detach"),
        *("repeat", "repeat_interleave", "roll", "flip", "chunk", "split", "unbind", "expand"),
        *("unflatten", "swapaxes", "movedim", "clone", "narrow"),
    }
)
"""Classes of modules, functions and names of methods, in eval mode."""
MORE_MOVES: frozenset[Any] = frozenset(
    {
        *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
        *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
        *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
        *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
        *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
        *(torch.amax, torch.amin, "amax", "amin", "flatten", torch.unflatten, torch.t, "t", ".mT", ".T"),
        *(torch.select, torch.index_select, torch.tile, "select", "index_select", "tile"),
        *(nn.Upsample, nn.UpsamplingNearest2d, F.interpolate),  # to the nearest value
    }
)
"""Further ones. PyTorch's engines have qparams there, as files of version 0.1.0 do."""
JOINS: frozenset[Any] = frozenset({torch.cat, torch.stack})
"""Functions that do the same with a list of tensors."""
MORE_JOINS: frozenset[Any] = frozenset({torch.concat, torch.concatenate, torch.hstack, torch.vstack})
"""Further ones, as in `MORE_MOVES`."""


def pads_with_zeros(node: fx.Node) -> bool:
    """Whether a call of `F.pad` adds zeros, or values of its input."""
    given: dict[str, Any] = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False))
    given |= node.kwargs
    return given.get("mode", "constant") != "constant" or not given.get("value")


_NEAREST = ("nearest", "nearest-exact")


def may_move_values(module: Any, node: fx.Node) -> bool:
    """Whether a call of one of these returns values of its input with the arguments that it has.

    Args:
        module: The module that the node calls, or None.
        node: The call.
    """
    if node.target is F.pad:
        return pads_with_zeros(node)
    if node.target is F.interpolate:
        mode = node.args[3] if len(node.args) > 3 else node.kwargs.get("mode", "nearest")
        return mode in _NEAREST
    return not isinstance(module, nn.Upsample) or module.mode in _NEAREST
