"""Restores the classes of batch-norms that Lightning or torch has replaced.

`Trainer(sync_batchnorm=True)` replaces every batch-norm after `setup` by a `SyncBatchNorm`, and after fit
by one of Lightning's own class. Neither remembers whether it was a BatchNorm1d, 2d or 3d, of which
conversion makes different int8 modules. So `prepare` notes it.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from qat_lightning.base.torch_internals import BatchNorm
from qat_lightning.modes.graph import behaviour

_ATTRIBUTE = "_batch_norms"


class LocalBatchNorm(BatchNorm):
    """A batch-norm over this process alone, of any number of dimensions."""

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
    """Makes the synchronized batch-norms inside `module` local, in place."""
    for child in module.modules():
        if isinstance(child, nn.SyncBatchNorm):
            child.__class__ = LocalBatchNorm  # type: ignore[assignment]
