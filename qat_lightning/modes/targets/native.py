"""What PyTorch's own int8 kernels compute: the backends x86, fbgemm, qnnpack and onednn."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from qat_lightning.modes.graph.dropout import detached
from qat_lightning.modes.graph.pads import pad_values
from qat_lightning.modes.layers.norm_relu import NormReLU
from qat_lightning.modes.targets.rules import Kind, Rule, Table


def _rules(rule: Rule, *operations: Any) -> Table:
    return dict.fromkeys(operations, rule)


# A sigmoid ends in 0…1 and a tanh in -1…1, whatever the data.
_UNIT, _SIGNED_UNIT = (1 / 256, 0), (2 / 256, 128)

NATIVE: Table = {
    **_rules(Rule(Kind.LAYER), nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    **_rules(Rule(Kind.LAYER, relu=True), F.conv1d, F.conv2d, F.conv3d, F.linear),
    **_rules(
        Rule(Kind.COMBINES, relu=True), operator.add, operator.iadd, torch.add, operator.mul, operator.imul,
        torch.mul,
    ),
    **_rules(Rule(Kind.COMPUTES), torch.matmul, operator.matmul),
    **_rules(
        Rule(Kind.COMPUTES), nn.BatchNorm2d, nn.BatchNorm3d, NormReLU, nn.ELU, nn.LeakyReLU, nn.Hardswish, nn.InstanceNorm1d, nn.InstanceNorm2d,
        nn.InstanceNorm3d, nn.LayerNorm, F.elu, F.leaky_relu, F.hardswish, F.instance_norm, F.layer_norm,
        F.group_norm,
    ),
    **_rules(
        Rule(Kind.COMPUTES, fixed=_UNIT), nn.Sigmoid, nn.Hardsigmoid, torch.sigmoid, F.sigmoid, F.hardsigmoid,
        "sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_",
    ),
    **_rules(Rule(Kind.COMPUTES, fixed=_SIGNED_UNIT), nn.Tanh, torch.tanh, F.tanh, "tanh", "tanh_"),
    **_rules(Rule(Kind.CONCATENATES), torch.cat, torch.stack),
    # The method "flatten" is not among them: files of version 0.1.0 have qparams there.
    **_rules(
        Rule(Kind.MOVES), nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle,
        nn.ChannelShuffle, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.ReLU, nn.Dropout, nn.Dropout1d,
        nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, StochasticDepth, torch.flatten, torch.reshape,
        torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze, torch.narrow, torch.repeat_interleave,
        torch.relu, F.relu, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.pixel_shuffle, F.pixel_unshuffle,
        F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.channel_shuffle, pad_values, detached,
        "reshape", "view", "transpose", "permute", "squeeze", "unsqueeze", "contiguous", "detach", "repeat",
        "repeat_interleave", "relu",
    ),
    **_rules(
        Rule(Kind.AVERAGES), nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Hardtanh, nn.ReLU6, F.avg_pool1d, F.avg_pool2d,
        F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.hardtanh,
        F.hardtanh_, F.relu6, F.interpolate, torch.clamp, torch.mean, "clamp", "mean",
    ),
    **_rules(Rule(Kind.READS_SHAPE), "shape", "size", "dim"),
    **_rules(
        Rule(Kind.ENDS), nn.Softmax, nn.LogSoftmax, nn.MultiheadAttention, "softmax", "log_softmax",
        torch.softmax, torch.log_softmax, F.softmax, F.log_softmax, F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
    ),
}  # fmt: skip
