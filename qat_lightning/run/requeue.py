"""`RequeueBetweenSteps`: the callback that delays SLURM's requeue checkpoint to the end of a step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.environments import SLURMEnvironment

from qat_lightning.base import lightning_internals


class RequeueBetweenSteps(pl.Callback):
    """Writes SLURM's requeue checkpoint between two steps, so that the run resumes exactly.

    When SLURM's signal arrives, Lightning writes the checkpoint at once, even in the middle of a backward
    pass, and then requeues the job. This callback waits for the end of the training step or validation batch,
    on every process. Outside of SLURM it does nothing.
    """

    def __init__(self) -> None:
        self._answer: Callable[[int, Any], Any] | None = None
        self._signal = signal.SIGUSR1
        self._came = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replaces Lightning's signal handler with one that only remembers the signal."""
        environment = lightning_internals.cluster_environment(trainer)
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return
        self._signal = environment.requeue_signal or signal.SIGUSR1
        answer = signal.getsignal(self._signal)
        if callable(answer) and answer != self._remember:
            self._answer, self._came = answer, False
            signal.signal(self._signal, self._remember)  # Lightning restores the original handler at the end

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Handles a signal, unless gradients for the next step have been accumulated already."""
        if not lightning_internals.accumulates(trainer):
            self._answer_if_it_came(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:  # type: ignore[override]
        """Handles a signal during a validation inside fit. The requeued run repeats the validation."""
        if not trainer.sanity_checking:
            self._answer_if_it_came(trainer)

    def _remember(self, *_: Any) -> None:
        self._came = True

    def _answer_if_it_came(self, trainer: pl.Trainer) -> None:
        if self._answer is None:
            return
        # The signal reaches the processes at different times, but all must write the checkpoint together.
        if trainer.strategy.reduce_boolean_decision(self._came, all=False):
            self._came = False
            self._answer(self._signal, None)
