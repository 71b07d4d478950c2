"""The operations that every backend computes alike: what only moves values, and what reads none."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from qat_lightning.modes.functions.attention import attend, attention_weights, merged_mask
from qat_lightning.modes.layers.moves import JOINS, MOVES
from qat_lightning.modes.targets.rules import Kind, Rule, Table, rules

COMMON: Table = {
    **rules(Rule(Kind.CONCATENATES), *JOINS),
    # The method "flatten" is not among MOVES: files of version 0.1.0 have qparams there.
    **rules(
        Rule(Kind.MOVES),
        *MOVES,
        F.pad,  # with zeros, or with its own values
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
