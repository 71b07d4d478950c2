"""PyTorch's oneDNN operators for int8, which take plain tensors of bytes."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from qat_lightning.base import cpu
from qat_lightning.modes.lowering.int8.qparams import QParams

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

    An input without a zero point is faster. So where nothing is padded, the bias takes over what the zero
    point contributes to each sum.
    """
    scale, zero_point = layer.qparams("input")[:2]
    bias, ndim = layer.bias, layer.weight.ndim
    if zero_point and not any(layer.geometry.padding):
        bias, zero_point = _bias_for_zero_point(layer), 0
    geometry = [[*each] for each in layer.geometry[:3]] + [layer.geometry.groups]
    tail = (layer.weight_scale, _zeros(layer), bias, *geometry, *_result(layer))
    operator = torch.ops.onednn.qconv_pointwise.default
    packed: torch.Tensor | None = None

    def run(x: torch.Tensor) -> torch.Tensor:
        nonlocal packed
        if x.dim() < ndim:
            return run(x.unsqueeze(0)).squeeze(0)
        if packed is None:
            packed = _packed(layer.weight, layer.weight_scale, scale, zero_point, geometry, x)
        return operator(x, scale, zero_point, packed, *tail)

    return run


def linear_kernel(layer: Any) -> Kernel:
    """Returns a function that computes a linear layer."""
    head = layer.qparams("input")[:2]
    tail = (layer.weight_scale, _zeros(layer), layer.bias, *_result(layer))
    operator = torch.ops.onednn.qlinear_pointwise.default
    packed = torch.ops.onednn.qlinear_prepack(layer.weight, None)

    def run(x: torch.Tensor) -> torch.Tensor:
        if x.dim() < 2:
            return run(x.unsqueeze(0)).squeeze(0)
        return operator(x, *head, packed, *tail)

    return run


def add_kernel(first: QParams, second: QParams, output: QParams, relu: bool) -> Kernel:
    """Returns a function that adds two images with channels last.

    It is a depthwise convolution by 1 that adds its result to the other image. oneDNN's own additions, `qadd`
    and `qadd_relu`, are wrong for bytes from 128 on.
    """
    swaps = second.zero_point == 0  # an input without a zero point is faster
    x_qparams, other_qparams = (second, first) if swaps else (first, second)
    to = (*output[:2], torch.uint8, *other_qparams[:2])
    after: tuple[Any, ...] = ("sum", 1.0, "relu" if relu else None, [], None)
    operator = torch.ops.onednn.qconv2d_pointwise.binary
    weights: dict[int, tuple[Any, ...]] = {}

    def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        x, other = (b, a) if swaps else (a, b)
        channels = x.shape[1]
        if channels not in weights:
            ones, geometry = torch.ones(channels), [[1, 1], [0, 0], [1, 1], channels]
            weight = torch.ones(channels, 1, 1, 1, dtype=torch.int8)
            packed = _packed(weight, ones, *x_qparams[:2], geometry, x)
            weights[channels] = packed, ones, torch.zeros(channels, dtype=torch.int64), geometry
        packed, ones, zeros, geometry = weights[channels]
        return operator(x, *x_qparams[:2], packed, ones, zeros, other.clone(), None, *geometry, *to, *after)

    return run


def _bias_for_zero_point(layer: Any) -> torch.Tensor:
    """Returns the bias for an input whose zero point is taken for 0."""
    scale, zero_point = layer.qparams("input")[:2]
    sums = layer.weight.flatten(1).sum(1, dtype=torch.float64) * layer.weight_scale.double()
    bias = 0 if layer.bias is None else layer.bias.double()
    shifted: torch.Tensor = bias - sums * (scale * zero_point)
    return shifted.float()


def _zeros(layer: Any) -> torch.Tensor:
    return torch.zeros(len(layer.weight_scale), dtype=torch.int64)


def _result(layer: Any) -> tuple[Any, ...]:
    """Returns the arguments that say what the result is."""
    output = layer.output_qparams()
    to = (1.0, 0, torch.float32) if output is None else (*output[:2], torch.uint8)
    return (*to, "relu" if layer.relu else "none", [], "")


def _packed(
    weight: torch.Tensor, scales: torch.Tensor, scale: float, zero_point: int, geometry: Any, x: torch.Tensor
) -> torch.Tensor:
    """Packs the weight of a convolution for inputs like `x`; for others each call packs it anew."""
    return torch.ops.onednn.qconv_prepack(weight, scales, scale, zero_point, *geometry, list(x.shape))
