"""Makes small batches of a Trainer's data, on which a copy of the module shows how it calls its networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl

from qat_lightning.analysis.example_batch import two_samples
from qat_lightning.base import lightning_internals


def fit_batches(trainer: pl.Trainer) -> dict[str, Callable[[], Any]]:
    """Returns, for each step of a fit, what makes a batch of two samples of its data, or None."""
    sources = {
        "validation_step": lightning_internals.validation_source(trainer),
        "training_step": lightning_internals.training_source(trainer),
    }
    return {step: partial(_two_samples, step, source) for step, source in sources.items()}


def calibration_batches(trainer: pl.Trainer) -> dict[str, Callable[[], Any]]:
    """Returns the same for `trainer.validate`."""
    source = lightning_internals.calibration_source(trainer)
    return {"validation_step": partial(_two_samples, "validation_step", source)}


def _two_samples(step: str, source: Any) -> Any:
    try:
        loaders = _loaders_of(source)
        if step == "validation_step" and isinstance(loaders, Sequence):
            loaders = loaders[0] if loaders else None  # its batches come from one loader after the other
        return None if loaders is None else two_samples(loaders)
    except Exception as error:
        raise ValueError(
            f"To see how its networks are called, a copy of the module runs its {step} on two samples, and "
            f"asking for them in the callback's setup failed: {error} ({type(error).__name__}). Give the "
            "module an example_input_array, or make the data in the datamodule's `setup`."
        ) from error


def _loaders_of(source: Any) -> Any:
    return source.dataloader() if source.is_defined() else None
