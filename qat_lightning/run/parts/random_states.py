"""Exact resume: the random state of every process travels in the checkpoint.

Lightning restores none. The state is put back at the first epoch start after a resume; in mid-epoch, where
there is no epoch start, before the first batch's step, or before the validation that is due.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import distributed

from qat_lightning.base import random_state
from qat_lightning.run import progress

_KEY = "qat_random_state"


class RandomStates:
    """The random states of all ranks, between a checkpoint's load and the first step after it."""

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] = []

    def save(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Stores the state of every rank in `checkpoint`; every rank calls it."""
        states: list[Any] = [random_state.capture()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            distributed.all_gather_object(states, random_state.capture())
        checkpoint[_KEY] = states
        progress.record_due_validation(trainer, checkpoint)

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the states of `checkpoint` until they are restored."""
        self._states = checkpoint.get(_KEY, [])

    def clear(self) -> None:
        """Forgets states that were not restored."""
        self._states = []

    def restore_before_validation(self, trainer: pl.Trainer) -> None:
        """Puts this rank's generators back, if a validation comes before the first step."""
        if progress.validation_is_next(trainer):
            self.restore(trainer, epoch_start=False)

    def restore(self, trainer: pl.Trainer, *, epoch_start: bool) -> None:
        """Puts this rank's generators back, once after each load."""
        states, self._states = self._states, []
        if not states:
            return
        if len(states) != trainer.world_size:
            rank_zero_info(
                f"The checkpoint was saved by {len(states)} processes and this run has {trainer.world_size}: "
                "random states are not restored."
            )
            return
        random_state.restore(states[trainer.global_rank])
        if epoch_start:
            _renew_iterator(trainer)


def _renew_iterator(trainer: pl.Trainer) -> None:
    """Makes a resumed run draw its epoch's order from the restored random state.

    Lightning makes the first iterator of a run before any hook, and at a resume keeps it for the epoch; the
    uninterrupted run made a new one after `on_train_epoch_start`, as Lightning does in every other epoch.
    """
    loop = trainer.fit_loop
    renews = trainer.current_epoch > 0 and not loop.is_resuming and not loop.epoch_loop.restarting
    if not renews and loop._data_fetcher is not None:
        iter(loop._data_fetcher)
