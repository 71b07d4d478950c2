"""What OpenVINO computes in int8 on a CPU.

- It fuses any activation into the convolution or product before it. A rounding between the two would prevent
  that, so layers return floats.
- A batch-norm without a layer before it is rounded on both sides, so that a concatenation before it is int8.
- A transposed convolution is int8 if its input has no zero point, as after a ReLU. With a zero point, one of
  images becomes a plain convolution in the file (`export/blocks.py`). With groups it computes in float, from
  an int8 weight. That costs no time.
- Other norms and softmax compute in float, and read the full precision of what is before them.
"""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from qat_lightning.modes.layers.norm_relu import NormReLU
from qat_lightning.modes.targets.rules import Kind, Rule, Target, rules
from qat_lightning.modes.targets.runtimes import RUNTIMES

OPENVINO = Target(
    {
        **RUNTIMES,
        **rules(Rule(Kind.LAYER, float_result=True), nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
        **rules(
            Rule(Kind.LAYER, float_result=True),
            *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        ),
        **rules(Rule(Kind.LAYER, float_result=True), F.conv1d, F.conv2d, F.conv3d, F.linear),
        **rules(Rule(Kind.COMPUTES), nn.BatchNorm2d, nn.BatchNorm3d, NormReLU),
    },
    decomposes_attention=True,
    through_float=False,
)
