"""Padding with a tensor's own values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from qat_lightning.modes.functions.pads import pad_values


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
