"""The layers of a prepared network: they round their weight, and may hold the ReLU after them."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from qat_lightning.base.torch_internals import convolve, modules_of, own_registries
from qat_lightning.fake_quant.fake_quantize import FakeQuantize
from qat_lightning.fake_quant.numerics import rectify
from qat_lightning.modes.layers.integer_arithmetic import IntegerArithmetic, input_fake_quantize, round_bias


class TrainedLayer(IntegerArithmetic):
    """A convolution or linear layer that rounds its weight.

    Attributes:
        plain: The float class.
        weight_fake_quant: The fake-quantize of the weight.
        relu: Whether a ReLU follows, as a part of the layer.
    """

    plain: type[nn.Module]
    relu = False

    @classmethod
    def of(cls, layer: nn.Module, weight_fake_quant: nn.Module, *, relu: bool) -> Self:
        """Makes the prepared form of a float layer; they share the parameters."""
        made: Any = _like(layer, cls)
        made.weight_fake_quant, made.relu = weight_fake_quant, relu
        made.allocate()
        return made  # type: ignore[no-any-return]

    def allocate(self) -> None:
        """Sizes the per-channel qparams of the weight."""
        weight: Any = self.weight_fake_quant
        if isinstance(weight, FakeQuantize) and weight.axis == 0:
            weight.allocate(len(weight_rows(self)))

    def to_float(self) -> Any:
        """Returns the float layer, without the ReLU; they share the parameters."""
        layer = _like(self, self.plain)
        for name in ("weight_fake_quant", "bn"):
            modules_of(layer).pop(name, None)
        for name in ("relu", "freeze_bn", "input_fake_quantize"):
            vars(layer).pop(name, None)
        return layer

    @torch.no_grad()
    def to_int8(self) -> Any:
        """Returns the float layer whose weight int8 rounds, with the bias that eval mode computes with."""
        layer, source = self.to_float(), input_fake_quantize(self)
        if source is not None and layer.bias is not None and source.rounding:
            layer.bias = nn.Parameter(round_bias(layer.bias, source.scale * self.channel_scale()))
        return layer

    @property
    def row_is_channel(self) -> bool:
        """Whether a row of the weight makes one output channel."""
        return True

    def rows_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns a weight as rows: each index of the first dimension has a scale."""
        return weight

    def weight_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the weight with these rows."""
        return rows

    def over_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Returns values of the output channels in a shape that broadcasts over the rows."""
        layer: Any = self
        return values.view([-1] + [1] * (layer.weight.ndim - 1))

    def stored_scales(self) -> tuple[int, int] | None:
        """Returns the axis along which a file has the scales of the weight, and how often it has each.

        None for the axis of the fake-quantize, and once.
        """
        return None

    def run(self, x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns the convolution or the product of `x` and a weight."""
        layer: Any = self
        return F.linear(x, rows, bias) if isinstance(self, nn.Linear) else convolve(layer, x, rows, bias)

    def compute(
        self, x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None, *size: Any
    ) -> torch.Tensor:
        """Returns the convolution or the product of `x` and a weight; eval mode computes with integers.

        Args:
            x: The input.
            rows: The weight, as rows.
            bias: The bias, or None.
            *size: The size that a transposed convolution is called with, if any.
        """
        run: Any = self.run
        return self.integer_forward(lambda *args: run(*args, *size), x, rows, bias)

    def forward(self, x: torch.Tensor, *size: Any) -> torch.Tensor:
        """Returns the layer's output, before its own rounding."""
        layer: Any = self
        y = self.compute(x, layer.weight_fake_quant(weight_rows(layer)), layer.bias, *size)
        return rectify(y, in_place=True) if self.relu else y


class Conv1d(TrainedLayer, nn.Conv1d):
    """`nn.Conv1d`."""

    plain = nn.Conv1d


class Conv2d(TrainedLayer, nn.Conv2d):
    """`nn.Conv2d`."""

    plain = nn.Conv2d


class Conv3d(TrainedLayer, nn.Conv3d):
    """`nn.Conv3d`."""

    plain = nn.Conv3d


class Linear(TrainedLayer, nn.Linear):
    """`nn.Linear`."""

    plain = nn.Linear


def weight_rows(layer: Any) -> torch.Tensor:
    """Returns the weight of a prepared layer as rows: each index of the first dimension has a scale."""
    weight: torch.Tensor = layer.weight
    return layer.rows_of(weight) if isinstance(layer, TrainedLayer) else weight


def _like(layer: Any, kind: Any) -> Any:
    """Returns a module of another class with the attributes of `layer`; they share the parameters."""
    made = kind.__new__(kind)
    vars(made).update(vars(layer))
    vars(made).update({name: copy.copy(value) for name, value in own_registries(layer).items()})
    return made
