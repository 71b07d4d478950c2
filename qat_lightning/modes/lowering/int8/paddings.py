"""Padding, and a ReLU: what needs to know which byte stands for 0, or copies bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from qat_lightning.modes.functions.pads import pad_values
from qat_lightning.modes.lowering.int8.qparams import QParams
from qat_lightning.modes.lowering.int8.state import Lowered, Run


class PadValues(nn.Module):
    """Pads with the tensor's own values.

    Args:
        pads: How many elements to add on each side, as `F.pad` takes them.
        mode: `"circular"`, `"replicate"` or `"reflect"`.
    """

    def __init__(self, pads: Sequence[int], mode: str) -> None:
        super().__init__()
        self.pads, self.mode = list(pads), mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pad_values(x, self.pads, self.mode)


class ZeroPad(Lowered):
    """Pads with the byte that stands for 0.

    Args:
        pads: How many elements to add on each side, as `F.pad` takes them.
        input: Qparams of the input and of the result.
    """

    def __init__(self, pads: Sequence[int], input: QParams) -> None:
        super().__init__(input=input)
        self.pads = [*pads]

    def prepared(self) -> Run:
        return partial(F.pad, pad=self.pads, value=self.qparams("input").zero_point)


class Rectify(Lowered):
    """A ReLU on bytes.

    Args:
        input: Qparams of the input and of the result.
    """

    def __init__(self, input: QParams) -> None:
        super().__init__(input=input)

    def prepared(self) -> Run:
        return partial(torch.clamp, min=self.qparams("input").zero_point)
