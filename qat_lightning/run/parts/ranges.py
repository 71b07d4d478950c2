"""Merges ranges across processes, and pauses observers during evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import nn

from qat_lightning.fake_quant.phases import ObserversOff
from qat_lightning.run.distributed.merge_ranges import keep_out_of_ddp_broadcast, merge_ranges
from qat_lightning.run.part import Part


class MergedRanges(Part):
    """Merges the ranges of all processes before validations and checkpoints, and at the end of training.

    At the end of training the processes can communicate for the last time.
    """

    def after_prepare(self, module: pl.LightningModule, networks: Mapping[str, nn.Module]) -> None:
        keep_out_of_ddp_broadcast(module)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        merge_ranges(module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        merge_ranges(module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        merge_ranges(module)


class PausedObservers(Part):
    """Pauses observers during evaluation, so that they see training batches only."""

    def __init__(self) -> None:
        self._observers = ObserversOff()

    def on_evaluation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._observers.enter(module)

    def on_evaluation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._observers.leave()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._observers.leave()
