"""Scores a module by the metrics of its own steps, with a silent Trainer in this process alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torchmetrics import Metric


def lone_trainer(device: torch.device | None = None, **arguments: Any) -> pl.Trainer:
    """Builds a Trainer for one process and one device that writes and prints nothing.

    Args:
        device: Where to compute; the CPU by default.
        **arguments: Further arguments of the Trainer, such as `limit_val_batches`.
    """
    device = device or torch.device("cpu")
    with _silent():
        return pl.Trainer(
            accelerator=device.type,
            devices=[device.index or 0] if device.type == "cuda" else 1,
            strategy=SingleDeviceStrategy(device),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **arguments,
        )


def compute_metrics_alone(module: torch.nn.Module) -> None:
    """Makes the metrics in `module` wait for no other process, in place."""
    for each in module.modules():
        if isinstance(each, Metric):
            each.distributed_available_fn = _never


def _never() -> bool:
    return False


def validate(alone: pl.Trainer, module: pl.LightningModule, data: Any) -> dict[str, float]:
    """Returns what `module` logs when the :func:`lone_trainer` `alone` validates it on `data`."""
    results = alone.validate(module, dataloaders=data, verbose=False)
    return {name: float(value) for result in results for name, value in result.items()}


def score_on_test(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    *,
    device: torch.device | None = None,
    precision: Any = "32-true",
    limit_test_batches: float = 1.0,
) -> float:
    """Returns the accuracy on the whole test split, computed in this process alone.

    Args:
        module: Logs `test/accuracy` in its `test_step`.
        data: Has a test split.
        device: Where to compute; the CPU by default.
        precision: The Trainer's `precision`.
        limit_test_batches: Share (float) or number (int) of the batches to use.
    """
    trainer = lone_trainer(device, precision=precision, limit_test_batches=limit_test_batches)
    (results,) = trainer.test(module, datamodule=data, verbose=False)
    return float(results["test/accuracy"])


@contextmanager
def _silent() -> Iterator[None]:
    """Silences what Lightning logs about devices when it creates another Trainer."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "[A-Z]+ available but not used")
            yield
    finally:
        logger.setLevel(level)
