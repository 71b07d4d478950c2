"""Stores the random state of every process in checkpoints, so that a run resumes exactly.

Lightning does not restore it. The state is restored at the first epoch start after a resume. A resume in the
middle of an epoch has no epoch start, so the state is restored before the first batch, or before a validation
that is due.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from qat_lightning.base import lightning_internals, random_state
from qat_lightning.run import progress
from qat_lightning.run.distributed.processes import gather
from qat_lightning.run.part import Part

_KEY = "qat_random_state"


class RandomStates(Part):
    """Keeps the random states of all ranks from the load of a checkpoint until the first step after it."""

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] = []

    def check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._states = []

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if progress.validation_is_next(trainer):
            self._restore(trainer, epoch_start=False)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._restore(trainer, epoch_start=True)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._restore(trainer, epoch_start=False)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        progress.forget_restart(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stores the state of every rank. Every rank must call it."""
        checkpoint[_KEY] = gather(random_state.capture())
        progress.store_due_validation(trainer, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit":
            self._states = checkpoint.get(_KEY, [])

    def _restore(self, trainer: pl.Trainer, *, epoch_start: bool) -> None:
        """Restores this rank's generators, once after each load."""
        states, self._states = self._states, []
        if not states:
            return
        if len(states) != trainer.world_size:
            rank_zero_info(
                f"The checkpoint was saved by {len(states)} processes, but this run has "
                f"{trainer.world_size}. Random states are not restored."
            )
            return
        random_state.restore(states[trainer.global_rank])
        if epoch_start:
            _renew_iterator(trainer)


def _renew_iterator(trainer: pl.Trainer) -> None:
    """Makes a resumed run draw the batch order of its epoch from the restored random state.

    Lightning creates the first iterator of a run before any hook, and after a resume uses that iterator for
    the whole epoch. An uninterrupted run creates a new iterator after `on_train_epoch_start`, as in every
    other epoch.
    """
    loop = trainer.fit_loop
    renews = trainer.current_epoch > 0 and not loop.is_resuming and not loop.epoch_loop.restarting
    if not renews and lightning_internals.has_begun_epoch(trainer):
        lightning_internals.renew_iterator(trainer)
