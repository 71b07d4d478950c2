"""Quantize and dequantize: where tensors enter and leave the integer part of a network."""

from __future__ import annotations

from typing import Any

import torch

from qat_lightning.modes.lowering.int8.memory import in_blocks
from qat_lightning.modes.lowering.int8.qparams import QParams, dequantized, quantized, rounded
from qat_lightning.modes.lowering.int8.state import Lowered, Run


class Quantize(Lowered):
    """Rounds a float tensor to bytes.

    Args:
        output: Qparams of the bytes.
        channels_last: Whether to store the channels of an image last, as convolutions want it.
    """

    def __init__(self, output: QParams, channels_last: bool = False) -> None:
        super().__init__(output=output)
        self.channels_last = channels_last

    def prepared(self) -> Run:
        output = self.qparams("output")
        last = {4: torch.channels_last, 5: torch.channels_last_3d} if self.channels_last else {}

        def run(x: torch.Tensor) -> torch.Tensor:
            x = x.detach()
            if x.ndim not in last:
                return in_blocks(lambda part, out: quantized(part, output, out), x)
            out = torch.empty_like(x, dtype=torch.uint8, memory_format=last[x.ndim])
            for image, target in zip(x.split(1), out.split(1), strict=True):
                steps = torch.empty_like(target, dtype=torch.float32).copy_(image)
                rounded(steps.mul_(1 / output.scale), output, target)
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
