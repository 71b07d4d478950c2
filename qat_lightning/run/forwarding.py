"""The base of the callback: a Lightning callback that forwards each hook to a list of parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from qat_lightning.run.part import Part


class ForwardingCallback(pl.Callback):
    """Forwards Lightning's hooks to its parts, and collects their states for the checkpoint.

    Validation, test and prediction also count as evaluation: `on_evaluation_start` runs after
    `on_validation_start`, and `on_evaluation_end` before `on_validation_end`.

    Args:
        parts: The parts, in the order in which they are called.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for part in self._parts:
            part.on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for part in self._parts:
            part.on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for part in self._parts:
            part.on_train_epoch_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for part in self._parts:
            part.on_train_batch_start(trainer, pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        for part in self._parts:
            part.on_before_backward(trainer, pl_module, loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for part in self._parts:
            part.on_after_backward(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        for part in self._parts:
            part.on_before_optimizer_step(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for part in self._parts:
            part.on_train_batch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for part in self._parts:
            part.on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for part in self._parts:
            part.on_train_end(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for part in self._parts:
            part.on_validation_start(trainer, pl_module)
        self._on_evaluation_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for part in self._parts:
            part.on_validation_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._on_evaluation_end(trainer, pl_module)
        for part in self._parts:
            part.on_validation_end(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._on_evaluation_start(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._on_evaluation_end(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._on_evaluation_start(trainer, pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._on_evaluation_end(trainer, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        for part in self._parts:
            part.on_exception(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for part in self._parts:
            part.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of all parts, as plain values."""
        return {key: value for part in self._parts for key, value in part.state_dict().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part in self._parts:
            part.load_state_dict(state_dict)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for part in self._parts:
            part.on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for part in self._parts:
            part.on_load_checkpoint(trainer, pl_module, checkpoint)

    def _on_evaluation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for part in self._parts:
            part.on_evaluation_start(trainer, module)

    def _on_evaluation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for part in self._parts:
            part.on_evaluation_end(trainer, module)
