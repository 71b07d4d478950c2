"""Transposed convolutions on bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qat_lightning.base.torch_internals import convolve, modules_of, output_padding
from qat_lightning.modes.lowering.int8 import onednn
from qat_lightning.modes.lowering.int8.exact import ExactKernel
from qat_lightning.modes.lowering.int8.layers import Geometry, Int8Layer, Weight
from qat_lightning.modes.lowering.int8.qparams import QParams
from qat_lightning.modes.lowering.int8.state import Run
from qat_lightning.modes.lowering.sub_pixels import Transposed, cut, sub_pixels


class Int8Transposed(Int8Layer):
    """A transposed convolution, with a ReLU or without.

    oneDNN has no operator for it that takes plain tensors. It computes the plain convolution of the same
    pixels, where there is one.

    Args:
        weight: The weight and the bias.
        layer: The layer of torch.nn, without its weight and its bias.
        relu: Whether a ReLU follows.
        input: Qparams of the input.
        output: Qparams of the result; None for a float result.
    """

    def __init__(
        self, weight: Weight, layer: Any, relu: bool, input: QParams, output: QParams | None
    ) -> None:
        super().__init__(weight, None, relu, input, output)
        modules_of(self)["layer"] = layer

    def prepared(self) -> Run:
        kernels: dict[tuple[int, ...], Run] = {}
        layer = self.get_submodule("layer")

        def run(x: torch.Tensor, *size: Any) -> torch.Tensor:
            added = tuple(output_padding(layer, x, *size or (None,)))
            if added not in kernels:
                kernels[added] = self._of_blocks(added) or _Exact(self)
            return kernels[added](x, *size)

        return run

    def _of_blocks(self, added: Sequence[int]) -> Run | None:
        """Returns a plain convolution that makes blocks of pixels; None if there is none."""
        layer: Any = self.get_submodule("layer")
        how = Transposed(layer.stride, layer.padding, added, layer.groups, layer.dilation)
        blocks = sub_pixels(self.weight, how, even=True) if onednn.is_exact() else None
        if blocks is None:
            return None
        scale = self.weight_scale.repeat_interleave(blocks.block**2)
        bias = None if self.bias is None else self.bias.repeat_interleave(blocks.block**2)
        geometry = Geometry([1, 1], [*blocks.before], [1, 1], 1)
        weight, output = Weight(blocks.weight, scale, bias), self.output_qparams()
        plain = Int8Layer(weight, geometry, self.relu, self.qparams("input"), output)
        kernel = onednn.conv_kernel(plain)

        def run(x: torch.Tensor, *size: Any) -> torch.Tensor:
            y = cut(kernel(x), blocks)
            return y.contiguous(memory_format=torch.channels_last) if y.ndim == 4 else y

        return run


class _Exact(ExactKernel):
    """Computes a transposed convolution with sums of integers in floats."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer, _rows(layer.weight, layer.layer.groups))
        self.layer = layer.layer

    def _sums(self, x: torch.Tensor, *size: Any) -> torch.Tensor:
        return convolve(self.layer, x, self.weight, None, *size)


def _rows(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Returns the weights of each output channel."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
