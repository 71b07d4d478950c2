"""Restores the classes of batch-norms that Lightning or torch has replaced.

With `Trainer(sync_batchnorm=True)` every batch-norm becomes a `SyncBatchNorm` after `setup`, and an instance
of a Lightning class after fit. Neither tells whether it was a BatchNorm1d, 2d or 3d, but each of these
converts to a different int8 module. So `prepare` stores the original class.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from qat_lightning.base.torch_internals import BatchNorm
from qat_lightning.modes.graph import behaviour

_ATTRIBUTE = "_batch_norms"


class LocalBatchNorm(BatchNorm):
    """A batch-norm for any number of dimensions that uses the statistics of this process alone."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Accepts any number of dimensions."""


def note_batch_norms(network: nn.Module) -> None:
    """Stores the classes of the batch-norms inside `network` as an attribute, which copies keep."""
    named = network.named_modules(remove_duplicate=False)
    noted = {name: type(module) for name, module in named if isinstance(module, BatchNorm)}
    if isinstance(network, fx.GraphModule):
        behaviour.attach(network, {_ATTRIBUTE: noted})
    else:
        setattr(network, _ATTRIBUTE, noted)


def restore_batch_norms(network: nn.Module) -> None:
    """Restores the stored class of each batch-norm in a prepared network, in place."""
    present = dict(network.named_modules(remove_duplicate=False))
    noted: dict[str, type[nn.Module]] = getattr(network, _ATTRIBUTE, {})
    for name, kind in noted.items():
        if isinstance(present.get(name), BatchNorm):
            present[name].__class__ = kind


def make_local(module: nn.Module) -> None:
    """Makes every SyncBatchNorm inside `module` work on this process alone, in place."""
    for child in module.modules():
        if isinstance(child, nn.SyncBatchNorm):
            child.__class__ = LocalBatchNorm  # type: ignore[assignment]
