"""Copies a network, so that the run of an example changes nothing of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qat_lightning.base.torch_internals import BatchNorm, buffers_of
from qat_lightning.modes.purity.structure import structural_copy


def isolated_copy(network: nn.Module, *, training: bool) -> nn.Module:
    """Returns a copy of `network` in one mode that shares its parameters, but nothing that a forward changes.

    Buffers, and tensors in plain attributes, are copied: a forward in training mode may write into them.
    """
    copy = structural_copy(network)
    own: dict[int, Any] = {}
    for module in copy.modules():
        module.training = training
        for values in (buffers_of(module), vars(module)):
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    values[name] = own.setdefault(id(value), value.detach().clone())
    return copy


def use_running_statistics(network: nn.Module) -> None:
    """Puts batch-norms into eval mode: an example of one sample has no statistics."""
    for module in network.modules():
        if isinstance(module, BatchNorm) and module.running_mean is not None:
            module.training = False
