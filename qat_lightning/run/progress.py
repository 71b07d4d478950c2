"""Reads and corrects Lightning's loop counters in checkpoints, so that a resumed run validates correctly.

A checkpoint can be written after a batch whose validation is still due, or in the middle of a validation.
When Lightning resumes, it skips the first and finishes only the rest of the second. The best weights could
then differ from those of an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from qat_lightning.base import lightning_internals

_BATCHES = "epoch_loop.batch_progress"
_VALIDATION = "epoch_loop.val_loop.batch_progress"
_BEGUN = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def has_begun(checkpoint: Mapping[str, Any]) -> bool:
    """Returns whether the run had trained on a batch when a checkpoint was written."""
    return bool(_batches(checkpoint)["total"]["processed"])


def is_between_steps(checkpoint: Mapping[str, Any]) -> bool:
    """Returns whether a checkpoint was written between two training steps, and so resumes exactly."""
    current = _batches(checkpoint)["current"]
    return bool(current["ready"] == current["processed"])


def store_due_validation(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Stores in a checkpoint that a validation is next, if one is due.

    The counters then say that the batch is completed, and that a validation has begun but done no batch.
    """
    if not is_between_steps(checkpoint) or not _validation_is_due(trainer):
        return
    batches = _batches(checkpoint)
    for counts in (batches["total"], batches["current"]):
        counts["completed"] = counts["processed"]
    checkpoint["loops"]["fit_loop"][_VALIDATION] |= {
        "total": dict(_BEGUN),
        "current": dict(_BEGUN),
        "is_last_batch": False,
    }


def validation_is_next(trainer: pl.Trainer) -> bool:
    """Returns whether a resumed run begins with a validation."""
    return trainer.fit_loop.epoch_loop.val_loop.restarted_mid_evaluation


def forget_restart(trainer: pl.Trainer) -> None:
    """Resets the counters of an interrupted run when a validation starts.

    Otherwise the count of validation batches would make the next checkpoint look like one from an interrupted
    validation. Lightning also skips ReduceLROnPlateau while the epoch counts as restarted, because it expects
    the metric to be missing.
    """
    if trainer.state.fn == "fit" and not trainer.sanity_checking:
        loop = trainer.fit_loop
        loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()
        lightning_internals.forget_restart(trainer)


def _batches(checkpoint: Mapping[str, Any]) -> Any:
    return checkpoint["loops"]["fit_loop"][_BATCHES]


def _validation_is_due(trainer: pl.Trainer) -> bool:
    if trainer.state.fn != "fit":
        return False
    loop: Any = trainer.fit_loop.epoch_loop
    if trainer.validating:
        done = loop.val_loop.batch_progress
        return not (done.is_last_batch and done.current.completed == done.current.ready)
    just_done = loop.batch_progress.current.completed < loop.batch_progress.current.processed
    return bool(just_done and lightning_internals.validates_now(trainer))
