"""Validation of the int8 network while it is trained: what would be shipped if the run ended here."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from qat_lightning import random_state
from qat_lightning.quantize import convert

_PREFIXES = ("val/", "val_", "valid/", "valid_", "validation/", "validation_")


def validate_int8(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
    """Scores a converted copy of `module` with its own `validation_step` and metrics, on the CPU.

    Neither the module nor its loaders' workers nor any random generator is disturbed. Under distributed
    training every rank scores its share of the data.

    Args:
        trainer: The Trainer, at the end of a validation epoch.
        module: The LightningModule that is trained, with its prepared networks.

    Returns:
        For each metric that the module logs, by its name without a leading `val`: `val_int8/<name>`, what
        int8 reaches, and `quantization_gap/<name>`, what fake-quantization reaches minus that.
    """
    expected = trainer.callback_metrics
    with random_state.kept(), torch.inference_mode(False), torch.no_grad():
        results = _runner(trainer).validate(
            convert(module), dataloaders=trainer.val_dataloaders, verbose=False
        )
    scores: dict[str, float] = {}
    for name, value in ((name, value) for result in results for name, value in result.items()):
        short = next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
        scores[f"val_int8/{short}"] = value
        if name in expected:
            scores[f"quantization_gap/{short}"] = float(expected[name]) - value
    return scores


def _runner(trainer: pl.Trainer) -> pl.Trainer:
    with _silent():
        return pl.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=SingleDeviceStrategy("cpu"),
            limit_val_batches=trainer.limit_val_batches,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=trainer.default_root_dir,
        )


@contextmanager
def _silent() -> Iterator[None]:
    """Without Lightning's lines about the devices of another Trainer."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
