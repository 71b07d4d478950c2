"""Stops a run at the first NaN or infinity, while weights and checkpoints are still good."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from torch import nn

from qat_lightning.quantize.nonfinite import NonFiniteWatch
from qat_lightning.run.distributed.processes import fail_together
from qat_lightning.run.part import Part

_EVERY = 50
"""Steps between two checks of the flags on a GPU. Each check waits for the GPU."""


class NonFiniteGuard(Part):
    """Raises before an optimizer step or a checkpoint if a NaN or an infinity was observed."""

    def __init__(self) -> None:
        self._watch = NonFiniteWatch({})

    def after_prepare(self, module: pl.LightningModule, networks: Mapping[str, nn.Module]) -> None:
        self._watch = NonFiniteWatch(networks)
        self._watch.clear()

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if module.device.type == "cpu" or trainer.global_step % _EVERY == 0:
            self._watch.check(trainer.global_step)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        with fail_together("checking for a NaN before a checkpoint"):
            self._watch.check(trainer.global_step)
            self._watch.check_weights(trainer.global_step)
