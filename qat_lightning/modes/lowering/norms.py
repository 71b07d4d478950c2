"""Batch-norms without a layer before them: a table of bytes for each channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qat_lightning.base.torch_internals import BatchNorm
from qat_lightning.modes.layers.norm_relu import NormReLU
from qat_lightning.modes.lowering.int8.qparams import QParams
from qat_lightning.modes.lowering.int8.tables import ChannelTable, Table

_DIMS: dict[Any, int] = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}


def norm_of(module: Any) -> Any:
    """Returns the batch-norm of images that a module computes, with a ReLU or without; None for others."""
    norm: Any = module[0] if isinstance(module, NormReLU) else module
    known = isinstance(norm, BatchNorm) and type(norm) in _DIMS and norm.running_mean is not None
    return norm if known else None


def table_of(
    function: Callable[[torch.Tensor], torch.Tensor], norms: Sequence[Any], input: QParams, output: QParams
) -> Table | ChannelTable | None:
    """Returns a table for a function of one tensor; None if its norms disagree.

    Args:
        function: The function.
        norms: The batch-norms that it computes.
        input: Qparams of the input.
        output: Qparams of the result.
    """
    if not norms:
        return Table(function, input, output)
    kinds = {(len(norm.running_mean), _DIMS[type(norm)]) for norm in norms}
    return ChannelTable(function, *kinds.pop(), input, output) if len(kinds) == 1 else None
