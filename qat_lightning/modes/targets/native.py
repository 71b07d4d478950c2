"""What PyTorch's own int8 kernels compute: the backends x86, fbgemm, qnnpack and onednn."""

from __future__ import annotations

import operator

import torch
from torch import nn
from torch.nn import functional as F

from qat_lightning.modes.layers.norm_relu import NormReLU
from qat_lightning.modes.targets.common import COMMON
from qat_lightning.modes.targets.rules import Kind, Rule, Target, rules

# A sigmoid ends in 0…1 and a tanh in -1…1, whatever the data.
UNIT, SIGNED_UNIT = (1 / 256, 0), (2 / 256, 128)

NATIVE = Target(
    {
        **COMMON,
        **rules(Rule(Kind.LAYER), nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
        **rules(Rule(Kind.LAYER), nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        **rules(Rule(Kind.LAYER, relu=True), F.conv1d, F.conv2d, F.conv3d, F.linear),
        **rules(Rule(Kind.COMBINES, relu=True), operator.add, operator.iadd, torch.add),
        **rules(Rule(Kind.COMBINES, relu=True), operator.mul, operator.imul, torch.mul),
        **rules(Rule(Kind.COMPUTES), torch.matmul, operator.matmul),
        **rules(Rule(Kind.COMPUTES), nn.BatchNorm2d, nn.BatchNorm3d, NormReLU, nn.LayerNorm, F.layer_norm),
        **rules(Rule(Kind.COMPUTES), nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        **rules(Rule(Kind.COMPUTES), F.instance_norm, F.group_norm),
        **rules(Rule(Kind.COMPUTES), nn.ELU, nn.LeakyReLU, nn.Hardswish, F.elu, F.leaky_relu, F.hardswish),
        **rules(Rule(Kind.COMPUTES, fixed=UNIT), nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_"),
        **rules(
            Rule(Kind.COMPUTES, fixed=UNIT), nn.Hardsigmoid, F.hardsigmoid, "hardsigmoid", "hardsigmoid_"
        ),
        **rules(Rule(Kind.COMPUTES, fixed=SIGNED_UNIT), nn.Tanh, torch.tanh, F.tanh, "tanh", "tanh_"),
    }
)
