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


def store_batch_norm_classes(network: nn.Module) -> None:
    """Stores the classes of the batch-norms inside `network` in an attribute that survives copies."""
    named = network.named_modules(remove_duplicate=False)
    classes = {name: type(module) for name, module in named if isinstance(module, BatchNorm)}
    if isinstance(network, fx.GraphModule):
        behaviour.attach(network, {_ATTRIBUTE: classes})
    else:
        setattr(network, _ATTRIBUTE, classes)


def restore_batch_norms(network: nn.Module) -> None:
    """Restores the stored class of each batch-norm in a prepared network, in place."""
    present = dict(network.named_modules(remove_duplicate=False))
    stored: dict[str, type[nn.Module]] = getattr(network, _ATTRIBUTE, {})
    for name, original_class in stored.items():
        if isinstance(present.get(name), BatchNorm):
            present[name].__class__ = original_class


def make_local(module: nn.Module) -> None:
    """Makes every SyncBatchNorm inside `module` work on this process alone, in place."""
    for child in module.modules():
        if isinstance(child, nn.SyncBatchNorm):
            child.__class__ = LocalBatchNorm  # type: ignore[assignment]
