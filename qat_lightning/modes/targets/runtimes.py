"""What ONNX Runtime and OpenVINO have in common, beyond what every backend computes alike.

PyTorch's engines lack these rows, since files of version 0.1.0 have qparams there.
"""

from __future__ import annotations

import operator

import torch

from qat_lightning.modes.layers.moves import MORE_JOINS, MORE_MOVES
from qat_lightning.modes.targets.common import COMMON
from qat_lightning.modes.targets.rules import Kind, Rule, Table, rules

RUNTIMES: Table = {
    **COMMON,
    **rules(Rule(Kind.CONCATENATES), *MORE_JOINS),
    **rules(Rule(Kind.MOVES), *MORE_MOVES),
    **rules(Rule(Kind.AVERAGES), torch.clip, "clip", "clip_", "clamp_"),
    **rules(Rule(Kind.COMBINES, relu=True), operator.add, operator.iadd, torch.add),
    **rules(Rule(Kind.COMBINES, relu=True), operator.mul, operator.imul, torch.mul),
    **rules(Rule(Kind.COMPUTES, float_result=True), torch.matmul, operator.matmul, torch.bmm, torch.mm),
    **rules(Rule(Kind.COMPUTES, float_result=True), torch.einsum, "matmul", "bmm", "mm"),
}
