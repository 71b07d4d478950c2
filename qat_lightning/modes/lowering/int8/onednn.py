"""PyTorch's oneDNN operators for int8, which take plain tensors of bytes."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from qat_lightning.base import cpu

Kernel = Callable[..., torch.Tensor]


@cache
def has_operators() -> bool:
    """Whether this PyTorch has oneDNN's int8 operators for this kind of CPU."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    names = ("qconv_pointwise", "qconv2d_pointwise", "qlinear_pointwise")
    return x86 and torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.onednn, n) for n in names)


def is_exact() -> bool:
    """Whether the operators add products without overflow on this CPU."""
    return has_operators() and not cpu.overflows()


def conv_kernel(layer: Any) -> Kernel:
    """Returns a function that computes a convolution.

    For an input with a zero point oneDNN packs the weight of a convolution again at each call, but not that
    of a linear layer. So a convolution by 1 then runs as one.
    """
    scales, zero_point = _sum_scales(layer), layer.qparams("input").zero_point
    ndim = layer.weight.ndim
    if zero_point and _mixes_channels_only(layer):
        mix = linear_kernel(layer)
        return lambda x: mix(x.movedim(1 - ndim, -1).contiguous()).movedim(-1, 1 - ndim)
    geometry = [[*each] for each in layer.geometry[:3]] + [layer.geometry.groups]
    tail = (scales, _zeros(layer), layer.bias, *geometry, *_result(layer))
    operator = torch.ops.onednn.qconv_pointwise.default
    lowest = _zero_of_relu(layer)
    packed: torch.Tensor | None = None

    def run(x: torch.Tensor) -> torch.Tensor:
        nonlocal packed
        if x.dim() < ndim:
            return run(x.unsqueeze(0)).squeeze(0)
        if packed is None:
            packed = _packed(layer.weight, scales, zero_point, geometry, x)
        y = operator(x, 1.0, zero_point, packed, *tail)
        return y if lowest is None else y.clamp_(min=lowest)

    return run


def linear_kernel(layer: Any) -> Kernel:
    """Returns a function that computes a linear layer."""
    zero_point = layer.qparams("input").zero_point
    tail = (_sum_scales(layer), _zeros(layer), layer.bias, *_result(layer))
    operator = torch.ops.onednn.qlinear_pointwise.default
    packed = torch.ops.onednn.qlinear_prepack(layer.weight.flatten(1).contiguous(), None)

    def run(x: torch.Tensor) -> torch.Tensor:
        if x.dim() < 2:
            return run(x.unsqueeze(0)).squeeze(0)
        return operator(x, 1.0, zero_point, packed, *tail)

    return run


def _mixes_channels_only(layer: Any) -> bool:
    """Whether a convolution computes each place of its result from one place of its input."""
    geometry = layer.geometry
    by_one = all(size == 1 for size in (*layer.weight.shape[2:], *geometry.stride))
    return by_one and not any(geometry.padding) and geometry.groups == 1


def _sum_scales(layer: Any) -> torch.Tensor:
    """Returns the scale of each channel's sums. oneDNN would round after each of two factors."""
    scale: torch.Tensor = layer.weight_scale * layer.get_buffer("input_scale")
    return scale


def _zeros(layer: Any) -> torch.Tensor:
    return torch.zeros(len(layer.weight_scale), dtype=torch.int64)


def _result(layer: Any) -> tuple[Any, ...]:
    """Returns the arguments that say what the result is."""
    output = layer.output_qparams()
    to = (1.0, 0, torch.float32) if output is None else (*output[:2], torch.uint8)
    fuses = layer.relu and layer.weight.ndim < 5
    return (*to, "relu" if fuses else "none", [], "")


def _zero_of_relu(layer: Any) -> int | None:
    """Returns the smallest result of a ReLU that the operator does not do: one in three dimensions."""
    if not layer.relu or layer.weight.ndim < 5:
        return None
    output = layer.output_qparams()
    return 0 if output is None else output.zero_point


def _packed(
    weight: torch.Tensor, scales: torch.Tensor, zero_point: int, geometry: Any, x: torch.Tensor
) -> torch.Tensor:
    """Packs the weight of a convolution for inputs like `x`; for others each call packs it anew."""
    return torch.ops.onednn.qconv_prepack(weight, scales, 1.0, zero_point, *geometry, list(x.shape))
