"""What ONNX Runtime's int8 kernels compute on a CPU.

- A product of matrices returns floats at no cost (MatMulIntegerToFloat). So a norm, a GELU or a softmax after
  it, for which there are no int8 kernels, reads its full precision.
- A convolution returns int8. Sigmoid and LeakyReLU are int8, too. So are a SiLU, as a product with a sigmoid,
  and a batch-norm, as a convolution.
- Sums are int8 between convolutions. In a transformer they lead to a norm, and stay float.
- There is no kernel for a transposed convolution. One of images becomes a plain convolution in the file
  (`export/blocks.py`). A U-Net with LeakyReLU and kernels of 4 takes 8.5 ms with it and 13.6 ms without.
  Where it cannot, as with groups, it computes in float from an int8 weight. That costs no more time than a
  float weight, and the activation after it is int8. Those of one and three dimensions stay float.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from qat_lightning.modes.targets.native import UNIT
from qat_lightning.modes.targets.rules import Kind, Rule, Target, rules
from qat_lightning.modes.targets.runtimes import RUNTIMES

ONNX_RUNTIME = Target(
    {
        **RUNTIMES,
        **rules(Rule(Kind.LAYER), nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d),
        **rules(Rule(Kind.LAYER, float_result=True), nn.Linear),
        **rules(Rule(Kind.LAYER, relu=True), F.conv1d, F.conv2d, F.conv3d),
        **rules(Rule(Kind.LAYER, relu=True, float_result=True), F.linear),
        **rules(Rule(Kind.COMBINES, relu=True), "add", "add_", "mul", "mul_"),
        **rules(Rule(Kind.COMPUTES), nn.LeakyReLU, F.leaky_relu, nn.Hardswish, F.hardswish),
        **rules(Rule(Kind.COMPUTES, fixed=UNIT), nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_"),
    },
    decomposes_attention=True,
    decomposes_silu=True,
    norms_are_layers=True,
    through_float=False,
)
