"""Compares each int8 layer with its fake-quant and float forms, and measures what its range clips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qat_lightning.analysis.preflight.inventory import parts
from qat_lightning.base.inputs import Inputs
from qat_lightning.base.sqnr import sqnr
from qat_lightning.base.torch_internals import tree_leaves
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.modes.lowering.int8.layers import Int8Layer
from qat_lightning.modes.lowering.int8.qparams import dequantized, quantized
from qat_lightning.quantize.floating import is_int8
from qat_lightning.report.content import Layer

_BINS = 60
_EXACT = 60.0
"""Decibels from which an input or output counts as exact when a layer's loss is computed."""


class _Seen(NamedTuple):
    """The input and output of a layer in one forward pass."""

    x: Tensor
    y: Tensor


class _OutputQParams(NamedTuple):
    """The qparams and integer range of a layer's int8 output."""

    scale: float
    zero_point: int
    least: int
    greatest: int

    @property
    def range(self) -> tuple[float, float]:
        low, high = ((bound - self.zero_point) * self.scale for bound in (self.least, self.greatest))
        return low, high

    def round(self, y: Tensor) -> Tensor:
        integers = torch.clamp(torch.round(y / self.scale) + self.zero_point, self.least, self.greatest)
        return (integers - self.zero_point) * self.scale


def measure_layers(prepared: nn.Module, int8: nn.Module, inputs: Inputs) -> list[Layer]:
    """Runs a network in float, with fake-quantization and in int8, and compares the outputs of each layer.

    In each of the three passes, a layer reads the outputs of the layers before it, so errors add up as they
    do in the network. Fake-quant outputs are rounded with the scale and zero point of the int8 outputs, as
    the fake-quantize after the layer does.

    Args:
        prepared: The prepared network, in eval mode on the CPU. Its fake-quantization is left on.
        int8: The network after conversion.
        inputs: The inputs to run it on, from one batch.

    Returns:
        The int8 layers with weights, in the order in which they run.
    """
    names = [name for name, module in int8.named_modules() if is_int8(module) and hasattr(module, "weight")]
    modules = dict(prepared.named_modules())
    names = [name for name in names if hasattr(modules.get(name), "weight_fake_quant")]
    set_enabled(prepared, observer=False, fake_quant=False)
    in_float = _run(prepared, names, inputs)
    set_enabled(prepared, observer=False, fake_quant=True)
    fake_quant = _run(prepared, names, inputs)
    in_int8 = _run(int8, names, inputs)
    converted = dict(int8.named_modules())
    return [
        _compare(
            name, parts(modules[name]), in_float[name], fake_quant[name], converted[name], in_int8[name].y
        )
        for name in in_float
        if name in fake_quant and name in in_int8
    ]


def _compare(
    name: str, kind: str, in_float: _Seen, fake_quant: _Seen, layer: nn.Module, int8: Tensor
) -> Layer:
    qparams = _qparams_of(layer, int8)
    expected = fake_quant.y if qparams is None else _rounded(layer, qparams, fake_quant.y)
    value = _floats(layer, int8)
    agreement = sqnr(in_float.y, expected)
    low, high = qparams.range if qparams is not None else (-torch.inf, torch.inf)
    flat = in_float.y.flatten().float()
    edges = (float(flat.min()), float(flat.max()))
    return Layer(
        name=name,
        kind=kind,
        fake_quant_sqnr=agreement,
        int8_sqnr=sqnr(expected, value),
        loss=min(sqnr(in_float.x, fake_quant.x), _EXACT) - min(agreement, _EXACT),
        clipped=float(((flat < low) | (flat > high)).float().mean()),
        grid=(low, high),
        edges=edges,
        counts=tuple(int(count) for count in torch.histc(flat, _BINS, *edges)),
    )


def _rounded(layer: nn.Module, qparams: _OutputQParams, y: Tensor) -> Tensor:
    """Returns what the output of an int8 layer would stand for, if it computed `y`."""
    own = layer.output_qparams() if isinstance(layer, Int8Layer) else None
    return qparams.round(y) if own is None else dequantized(quantized(y, own), own)


def _floats(layer: nn.Module, y: Tensor) -> Tensor:
    """Returns the floats that the output of an int8 layer stands for."""
    if isinstance(layer, Int8Layer):
        qparams = layer.output_qparams()
        return y if qparams is None else dequantized(y, qparams)
    return y.dequantize() if y.is_quantized else y


def _qparams_of(layer: nn.Module, y: Tensor) -> _OutputQParams | None:
    """Returns the qparams of the output of an int8 layer; None if it is float."""
    if isinstance(layer, Int8Layer):
        qparams = layer.output_qparams()
        return None if qparams is None else _OutputQParams(*qparams)
    if not y.is_quantized:
        return None
    bounds = torch.iinfo(y.dtype)
    return _OutputQParams(y.q_scale(), y.q_zero_point(), int(bounds.min), int(bounds.max))


@torch.no_grad()
def _run(network: nn.Module, names: Iterable[str], inputs: Inputs) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}
    with _watched(network, names, seen):
        network(*inputs.args, **inputs.kwargs)
    return seen


@contextmanager
def _watched(network: nn.Module, names: Iterable[str], seen: dict[str, _Seen]) -> Iterator[None]:
    """Copies the input and output of each layer's first call into `seen`.

    They are copies because later operations may write in place.
    """
    modules = dict(network.named_modules())

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: object, kwargs: object, output: Tensor) -> None:
            if name not in seen:
                x = next(v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor))
                seen[name] = _Seen(x.clone(), output.clone())

        return modules[name].register_forward_hook(hook, with_kwargs=True, prepend=True)

    handles = [watch(name) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
