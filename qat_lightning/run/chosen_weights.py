"""Chooses the weights to convert: the best-ranked checkpoint with fake-quantization on, or the last."""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


class Choice(NamedTuple):
    """The weights to convert.

    Attributes:
        path: A checkpoint, or None for the weights that the run ended with.
        why: The reason for the choice, for the log.
        checkpoint: Content of the checkpoint; None without a path.
        metrics: Known metrics of these weights, by the names that the module logs.
    """

    path: str | None
    why: str
    checkpoint: dict[str, Any] | None
    metrics: dict[str, float]


def choose_weights(trainer: pl.Trainer, convert: str) -> Choice:
    """Chooses weights for `convert="best"` or `"last"`. Call it on rank 0 only: it reads checkpoints.

    The metric can peak before fake-quantization starts. Such a checkpoint was never trained for int8, so only
    checkpoints with fake-quantization on count for `"best"`.
    """
    last = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
    if convert == "last":
        return Choice(None, "the last weights, as requested", None, last)
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint) or callback.monitor is None:
        return Choice(None, "the last weights, since no ModelCheckpoint monitors a metric", None, last)
    sign = -1 if callback.mode == "max" else 1
    ranked = sorted(callback.best_k_models.items(), key=lambda item: sign * float(item[1]))
    for path, score in ranked:
        checkpoint = _read(trainer, path)
        if fake_quant_is_on(checkpoint["state_dict"]):
            why = f"the best weights by {callback.monitor} ({float(score):.4g})"
            return Choice(path, why, checkpoint, {callback.monitor: float(score)})
    return Choice(None, "the last weights, since no ranked checkpoint has fake-quantization on", None, last)


def fake_quant_is_on(state_dict: dict[str, Any]) -> bool:
    """Returns whether a state dict was saved while fake-quantization was on."""
    flags = [value for key, value in state_dict.items() if key.endswith("fake_quant_enabled")]
    return any(bool(flag.any()) for flag in flags)


def _read(trainer: pl.Trainer, path: str) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # Hyperparameters may be objects. The file is trusted because this run wrote it. Lightning reads it
        # the same way for `trainer.test(ckpt_path="best")`.
        checkpoint = trainer.strategy.load_checkpoint(path, weights_only=False)
    return dict(checkpoint)
