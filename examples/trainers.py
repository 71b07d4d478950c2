"""The Trainer of the examples that train several modules and print one table."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer


def trainer(*callbacks: Callback, **arguments: Any) -> Trainer:
    """Returns a Trainer on the CPU that keeps no checkpoints and prints no progress."""
    return Trainer(
        accelerator="cpu",
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
