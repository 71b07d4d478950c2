"""Scores each form of a trained module on the validation data, by the module's own metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn

from qat_lightning.analysis.scoring import lone_trainer, validate
from qat_lightning.base.inputs import Catcher, Inputs
from qat_lightning.export.load import size_of
from qat_lightning.modes.lowering.reference import floating
from qat_lightning.quantize.copies import copy_of
from qat_lightning.report.content import Score
from qat_lightning.run import trainer_facts
from qat_lightning.run.conversion import ConversionResult

SAMPLES = 8
"""Number of inputs to compare layers on: enough for histograms, and few enough to keep all outputs."""
RUNTIMES: Mapping[str, str] = {".pt": "PyTorch", ".onnx": "ONNX Runtime", ".xml": "OpenVINO"}

Shipped = Callable[[pl.LightningModule, Path], pl.LightningModule]


def score_all(
    trainer: pl.Trainer,
    outcome: ConversionResult,
    start: pl.LightningModule | None,
    names: Sequence[str],
    shipped: Shipped,
) -> tuple[list[Score], dict[str, Inputs]]:
    """Validates the float, the fake-quant and the int8 networks, each int8 file in its own runtime.

    Args:
        trainer: The Trainer, at the end of fit.
        outcome: The result of the conversion.
        start: The float module that the run started from, if it is known.
        names: Names of the prepared networks.
        shipped: Makes a module run an exported file.

    Returns:
        The scores, and for each network some of its inputs in the validation. Both are empty if the run has
        no validation data.
    """
    data = trainer_facts.validation_data(trainer)
    if data is None:
        return [], {}
    assert outcome.trained is not None
    device = trainer.strategy.root_device
    trained = copy_of(outcome.trained)
    scores = []
    if start is not None:
        metrics = _validate(trainer, start, data, device)
        scores.append(Score("float", "PyTorch", metrics, "val", bytes=_size_of_state(floating(trained))))
    with Catcher(map(trained.get_submodule, names), samples=SAMPLES) as catcher:
        scores.append(Score("fake-quant", "PyTorch", _validate(trainer, trained, data, device), "val"))
    inputs = {name: catcher.caught.get(trained.get_submodule(name)) for name in names}
    for suffix, runtime in RUNTIMES.items():
        files = [path for path in outcome.files if path.suffix == suffix]
        module = outcome.module if suffix == ".pt" else copy_of(trained)
        for path in files if suffix != ".pt" else ():
            module = shipped(module, path)
        if files or suffix == ".pt":
            metrics = _validate(trainer, module, data)
            file = ", ".join(path.name for path in files) or None
            size = sum(map(size_of, files)) or None
            scores.append(Score("int8", runtime, metrics, "val", file, size))
    return scores, {name: each for name, each in inputs.items() if each is not None}


def _size_of_state(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.state_dict().values())


def _validate(
    trainer: pl.Trainer, module: pl.LightningModule, data: object, device: torch.device | None = None
) -> dict[str, float]:
    alone = lone_trainer(
        device,
        precision=trainer.precision if device is not None else "32-true",
        limit_val_batches=trainer.limit_val_batches,
        default_root_dir=trainer.default_root_dir,
    )
    return validate(alone, module, data)
