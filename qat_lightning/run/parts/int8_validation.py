"""Validates an int8 copy of the module during training, and logs its metrics."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from qat_lightning.analysis.scoring import lone_trainer, validate
from qat_lightning.base import random_state
from qat_lightning.quantize.convert import convert
from qat_lightning.run.part import Part

_PREFIXES = ("val/", "val_", "valid/", "valid_", "validation/", "validation_")


class Int8Validation(Part):
    """Logs the metrics of an int8 copy. ModelCheckpoint and EarlyStopping can monitor them.

    Args:
        every_n_epochs: How often; None for never.

    Raises:
        ValueError: `every_n_epochs` is below 1.
    """

    def __init__(self, every_n_epochs: int | None) -> None:
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(
                f"int8_val_every_n_epochs must be None or at least 1, but received {every_n_epochs}."
            )
        self._every = every_n_epochs

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._every is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if (trainer.current_epoch + 1) % self._every == 0:
            module.log_dict(validate_int8(trainer, module), sync_dist=trainer.world_size > 1)


def validate_int8(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
    """Scores a converted copy of `module` with its own `validation_step` and metrics, on the CPU.

    The module, the workers of its loaders and all random generators stay as they are. In distributed training
    every rank scores its share of the data.

    Args:
        trainer: The Trainer, at the end of a validation epoch.
        module: The LightningModule in training, with its prepared networks.

    Returns:
        Two values for each metric that the module logs, under its name without a leading `val`:
        `val_int8/<name>` is the metric of int8, and `quantization_gap/<name>` is fake-quant minus int8.
    """
    expected = trainer.callback_metrics
    with random_state.preserved(), torch.inference_mode(False), torch.no_grad():
        alone = lone_trainer(
            limit_val_batches=trainer.limit_val_batches, default_root_dir=trainer.default_root_dir
        )
        logged = validate(alone, convert(module), trainer.val_dataloaders)
    scores: dict[str, float] = {}
    for name, value in logged.items():
        short = next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
        scores[f"val_int8/{short}"] = value
        if name in expected:
            scores[f"quantization_gap/{short}"] = float(expected[name]) - value
    return scores
