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
JOINS: frozenset[Any] = frozenset({torch.cat, torch.stack})
"""Functions that do the same with a list of tensors."""


def pads_with_zeros(node: fx.Node) -> bool:
    """Whether a call of `F.pad` adds zeros, or values of its input."""
    given: dict[str, Any] = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False))
    given |= node.kwargs
    return given.get("mode", "constant") != "constant" or not given.get("value")
