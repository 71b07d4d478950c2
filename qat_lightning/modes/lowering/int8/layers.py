"""Convolutions and linear layers on bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from qat_lightning.modes.lowering.int8 import onednn
from qat_lightning.modes.lowering.int8.exact import ExactKernel
from qat_lightning.modes.lowering.int8.qparams import QParams
from qat_lightning.modes.lowering.int8.state import Lowered, Run


class Geometry(NamedTuple):
    """How a convolution moves over its input."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class Weight(NamedTuple):
    """A layer's weight as int8, with a scale for each output channel, and its bias."""

    integers: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None


class Int8Layer(Lowered):
    """A convolution or a linear layer, with a ReLU or without.

    Args:
        weight: The weight and the bias.
        geometry: How the convolution moves; None for a linear layer.
        relu: Whether a ReLU follows.
        input: Qparams of the input.
        output: Qparams of the result; None for a float result.
        pad: Pads the input first, in a way that the convolution itself cannot; None for none.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: Weight,
        geometry: Geometry | None,
        relu: bool,
        input: QParams,
        output: QParams | None,
        pad: nn.Module | None = None,
    ) -> None:
        super().__init__(input=input, output=output)
        self.geometry, self.relu, self.is_float = geometry, relu, output is None
        self.pad = pad
        self.register_buffer("weight", weight.integers)
        self.register_buffer("weight_scale", weight.scale)
        self.register_buffer("bias", weight.bias)

    def output_qparams(self) -> QParams | None:
        """Returns the qparams of the result; None for a float result."""
        return None if self.is_float else self.qparams("output")

    def extra_repr(self) -> str:
        """Returns the shape of the weight, how the convolution moves, and whether a ReLU follows."""
        moves = {} if self.geometry is None else self.geometry._asdict()
        shown = {"weight": tuple(self.weight.shape), **moves, "relu": self.relu}
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    def prepared(self) -> Run:
        kernel, pad = self._kernel(), self.pad
        return kernel if pad is None else lambda x: kernel(pad(x))

    def _kernel(self) -> Run:
        if not onednn.is_exact():
            return ExactKernel(self)
        return onednn.linear_kernel(self) if self.geometry is None else onednn.conv_kernel(self)
