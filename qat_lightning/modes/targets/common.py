"""The operations that every backend computes alike: what only moves values, and what reads none."""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from qat_lightning.modes.functions.attention import attend, attention_weights, merged_mask
from qat_lightning.modes.functions.pads import pad_values
from qat_lightning.modes.graph.dropout import detached
from qat_lightning.modes.graph.nodes import RELUS
from qat_lightning.modes.targets.rules import Kind, Rule, Table, rules

COMMON: Table = {
    **rules(Rule(Kind.CONCATENATES), torch.cat, torch.stack),
    # The method "flatten" is not among them: files of version 0.1.0 have qparams there.
    **rules(
        Rule(Kind.MOVES),
        *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, *RELUS, StochasticDepth, detached, pad_values),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.pixel_shuffle, F.pixel_unshuffle),
        *(F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.channel_shuffle, torch.narrow),
        *(torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze),
        *(torch.repeat_interleave, torch.roll, torch.flip, torch.chunk, torch.split, torch.unbind),
        F.pad,  # with zeros, or with its own values
        *(torch.swapaxes, torch.movedim, torch.clone, operator.getitem),
        *("reshape", "view", "transpose", "permute", "squeeze", "unsqueeze", "contiguous", "detach"),
        *("repeat", "repeat_interleave", "roll", "flip", "chunk", "split", "unbind", "expand"),
        *("unflatten", "swapaxes", "movedim", "clone", "narrow"),
    ),
    **rules(
        Rule(Kind.AVERAGES),
        *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Hardtanh, nn.ReLU6),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.hardtanh, F.hardtanh_, F.relu6, F.interpolate),
        *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
        *(torch.clamp, torch.mean, "clamp", "mean"),
    ),
    **rules(Rule(Kind.READS_SHAPE), "shape", "size", "dim"),
    **rules(
        Rule(Kind.ENDS),
        *(nn.Softmax, nn.LogSoftmax, torch.softmax, torch.log_softmax, F.softmax, F.log_softmax),
        *("softmax", "log_softmax", nn.MultiheadAttention, F.multi_head_attention_forward),
        *(F.scaled_dot_product_attention, attention_weights, attend, merged_mask),
    ),
}
