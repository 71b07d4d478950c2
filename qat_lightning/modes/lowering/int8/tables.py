"""A function of one tensor of bytes: a table of 256 bytes, or one for each channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qat_lightning.modes.lowering.int8.memory import flat, laid_out_alike
from qat_lightning.modes.lowering.int8.qparams import QParams, dequantized, quantized
from qat_lightning.modes.lowering.int8.state import Lowered, Run

_IN_PAIRS = 1 << 18
"""From this many bytes on, two are looked up at once: smaller tensors cost less than loading 128 KiB."""


class Table(Lowered):
    """Looks each byte up.

    Args:
        function: The function of floats.
        input: Qparams of the input.
        output: Qparams of the result.
    """

    def __init__(self, function: Callable[[torch.Tensor], Any], input: QParams, output: QParams) -> None:
        super().__init__()
        with torch.no_grad():
            every = dequantized(torch.arange(256, dtype=torch.uint8), input)
            self.register_buffer("table", quantized(function(every), output))

    def prepared(self) -> Run:
        table = self.get_buffer("table")
        pairs: list[torch.Tensor] = []

        def run(x: torch.Tensor) -> torch.Tensor:
            (x,) = laid_out_alike(x)
            if x.numel() < _IN_PAIRS or x.numel() % 2:
                return _look_up(table, flat(x)).as_strided(x.shape, x.stride())
            if not pairs:
                pairs.append(_of_pairs(table))
            found = _look_up(pairs[0], flat(x).view(torch.uint16))
            return found.view(torch.uint8).as_strided(x.shape, x.stride())

        return run


class ChannelTable(Lowered):
    """Looks each byte up in the table of its channel.

    Args:
        function: The function of floats, which treats the elements of a channel alike.
        channels: The number of channels, which are the second dimension.
        dims: The number of dimensions of the input.
        input: Qparams of the input.
        output: Qparams of the result.
    """

    def __init__(
        self,
        function: Callable[[torch.Tensor], Any],
        channels: int,
        dims: int,
        input: QParams,
        output: QParams,
    ) -> None:
        super().__init__()
        with torch.no_grad():
            every = dequantized(torch.arange(256, dtype=torch.uint8), input)
            rows = every.repeat(channels, 1).view(1, channels, 256, *[1] * (dims - 3))  # without gaps
            self.register_buffer("table", quantized(function(rows), output).view(channels, 256))

    def prepared(self) -> Run:
        table = self.get_buffer("table")
        starts = torch.arange(len(table), dtype=torch.int32) * 256

        def run(x: torch.Tensor) -> torch.Tensor:
            (x,) = laid_out_alike(x)
            places = x + starts.view(-1, *[1] * (x.ndim - 2))
            return torch.index_select(table.view(-1), 0, flat(places)).as_strided(x.shape, x.stride())

        return run


def _look_up(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns the elements of a table at the places `x`; on several threads where PyTorch can."""
    threads = torch.get_num_threads()
    if threads == 1 or x.numel() % threads:
        return torch.index_select(table, 0, x.to(torch.int32))
    rows = x.to(torch.int64).view(threads, -1)  # `gather` divides the work by rows
    return torch.gather(table.expand(threads, -1), 1, rows).view(-1)


def _of_pairs(table: torch.Tensor) -> torch.Tensor:
    """Returns the table for two bytes at once: 65536 numbers of 16 bits."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    return table[every.to(torch.int64)].view(torch.int16)
