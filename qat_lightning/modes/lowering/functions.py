"""Functions of one tensor that treat each element alike: a table can replace them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.fake_quant.numerics import rectify

RELUS: frozenset[Any] = frozenset({nn.ReLU, F.relu, torch.relu, torch.relu_, rectify, "relu", "relu_"})
ADDITIONS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
PRODUCTS: frozenset[Any] = frozenset({operator.mul, operator.imul, torch.mul, "mul", "mul_"})
_ELEMENTWISE: frozenset[Any] = frozenset(
    {
        *(nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
        *(nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardtanh, nn.Softplus, nn.Softsign),
        *(F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish, F.sigmoid),
        *(F.hardsigmoid, F.logsigmoid, F.tanh, F.hardtanh, F.softplus, F.softsign),
        *(torch.sigmoid, torch.tanh, torch.clamp, torch.abs, torch.neg, torch.square, torch.sqrt),
        *(torch.rsqrt, torch.exp, torch.sub, torch.div, torch.pow, torch.erf, torch.sin, torch.cos),
        *(operator.sub, operator.isub, operator.truediv, operator.itruediv, operator.neg, operator.pow),
        *("sigmoid", "tanh", "clamp", "abs", "neg", "square", "sqrt", "rsqrt", "exp", "sub", "div", "pow"),
        *("clamp_", "sigmoid_", "tanh_", "sub_", "div_", "hardtanh", "leaky_relu", "erf", "sin", "cos"),
    }
)


def is_elementwise(target: Any, node: fx.Node) -> bool:
    """Whether a node computes each element of its result from the same element of its only input."""
    return len(node.all_input_nodes) == 1 and target in _ELEMENTWISE | RELUS | ADDITIONS | PRODUCTS


def is_pair(target: Any, node: fx.Node, targets: frozenset[Any]) -> bool:
    """Whether a node adds or multiplies two tensors, and does nothing else."""
    both = len(node.args) == 2 and all(isinstance(each, fx.Node) for each in node.args)
    return both and not node.kwargs and target in targets
