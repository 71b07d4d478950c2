"""Quantize and dequantize: where tensors enter and leave the integer part of a network."""

from __future__ import annotations

from typing import Any

import torch

from qat_lightning.fake_quant.numerics import settle_averages_
from qat_lightning.modes.lowering.int8.memory import in_blocks
from qat_lightning.modes.lowering.int8.qparams import QParams, dequantized, rounded
from qat_lightning.modes.lowering.int8.state import Lowered, Run


class Quantize(Lowered):
    """Rounds a float tensor to bytes.

    Args:
        output: Qparams of the bytes.
        channels_last: Whether to store the channels of an image last, as convolutions want it.
        averaged: Whether the tensor averages values with the same qparams, see `fake_quant.numerics.Kernel`.
    """

    def __init__(self, output: QParams, channels_last: bool = False, averaged: bool = False) -> None:
        super().__init__(output=output)
        self.channels_last, self.averaged = channels_last, averaged

    def prepared(self) -> Run:
        output, averaged = self.qparams("output"), self.averaged
        last = {4: torch.channels_last, 5: torch.channels_last_3d} if self.channels_last else {}

        def round_part(x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
            steps = x.float().mul(1 / output.scale)
            return rounded(settle_averages_(steps) if averaged else steps, output, out)

        def run(x: torch.Tensor) -> torch.Tensor:
            x = x.detach()
            if x.ndim not in last:
                return in_blocks(round_part, x)
            out = torch.empty_like(x, dtype=torch.uint8, memory_format=last[x.ndim])
            for image, target in zip(x.split(1), out.split(1), strict=True):
                round_part(torch.empty_like(target, dtype=torch.float32).copy_(image), target)
            return out

        return run


class Dequantize(Lowered):
    """Turns bytes, or a list of tensors of bytes, into the floats that they stand for.

    Args:
        input: Qparams of the bytes.
    """

    def __init__(self, input: QParams) -> None:
        super().__init__(input=input)

    def prepared(self) -> Run:
        qparams = self.qparams("input")

        def run(integers: Any) -> Any:
            if isinstance(integers, tuple | list):
                return type(integers)(map(run, integers))
            return dequantized(integers, qparams)

        return run
