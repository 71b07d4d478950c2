"""Runs `keep_for_target` inside a Trainer's run: finds the metric, the validation data and the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from qat_lightning.analysis.keep_for_target import keep_for_target
from qat_lightning.analysis.scoring import compute_metrics_alone
from qat_lightning.base import random_state
from qat_lightning.base.errors import TargetError
from qat_lightning.base.torch_internals import BatchNorm
from qat_lightning.quantize.copies import copy_of
from qat_lightning.quantize.options import Settings
from qat_lightning.run import trainer_facts


def what_to_measure(trainer: pl.Trainer, metric: str | None, mode: str | None) -> tuple[str, str]:
    """Returns the metric and its mode. What the target leaves open comes from the callback that monitors it.

    Args:
        trainer: The Trainer, with its callbacks.
        metric: The metric of the target, or None.
        mode: The mode of the target, or None.

    Raises:
        MisconfigurationException: Neither the target nor a callback names them.
    """
    callbacks = trainer_facts.callbacks(trainer)
    monitored = [
        (each.monitor, each.mode)
        for kind in (ModelCheckpoint, EarlyStopping)
        for each in callbacks
        if isinstance(each, kind) and each.monitor
    ]
    metric = metric or next((name for name, _ in monitored), None)
    if metric is None:
        raise MisconfigurationException(
            "An accuracy target needs a metric, and no ModelCheckpoint monitors one. Name it: "
            'AccuracyTarget(metric="val_accuracy", mode="max").'
        )
    mode = mode or next((each for name, each in monitored if name == metric), None)
    if mode is None:
        raise MisconfigurationException(
            f"An accuracy target has to know whether more or less of {metric!r} is better, but no "
            'ModelCheckpoint monitors it. Pass mode="max" or mode="min" to AccuracyTarget.'
        )
    return metric, mode


def search(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    settings: Settings,
    max_drop: float,
    metric: str,
    mode: str,
) -> tuple[str, ...]:
    """Searches on the run's device and validation data, in this process alone.

    Ranges are calibrated on validation data, too. Training batches would be augmented, and drawing them would
    change the state of loaders that count batches for an exact resume.

    Args:
        trainer: The Trainer, in `setup`.
        module: The float module. It does not change.
        settings: How to prepare it.
        max_drop: As in :func:`qat_lightning.keep_for_target`.
        metric: Name of a metric that the module's `validation_step` logs.
        mode: `"max"` or `"min"`.

    Raises:
        TargetError: No choice of float layers reaches the target, or the module is not trained.
        MisconfigurationException: There is no validation data, or more than one loader.
    """
    with random_state.preserved():
        loader = _validation_loader(trainer)
        alone = copy_of(module).to(trainer.strategy.root_device)
        _check_trained(alone)
        compute_metrics_alone(alone)
        return keep_for_target(
            alone,
            loader,
            metric,
            max_drop=max_drop,
            higher_is_better=mode == "max",
            modules=settings.modules,
            **settings.options,
        )


class _First:
    """The first batches of a loader, read again at every pass."""

    def __init__(self, loader: Iterable[Any], count: int) -> None:
        self._loader, self._count = loader, count

    def __iter__(self) -> Iterator[Any]:
        return islice(self._loader, self._count)


def _validation_loader(trainer: pl.Trainer) -> Iterable[Any]:
    """Returns the Trainer's validation loader, limited by `limit_val_batches`."""
    try:
        data = trainer_facts.validation_data(trainer)
    except Exception as error:
        raise MisconfigurationException(
            "An accuracy target needs the validation data before LightningModule.setup runs, but loading it "
            f"failed: {error!r}. Create it in the datamodule's `setup`, or in `val_dataloader` itself."
        ) from error
    limit = trainer.limit_val_batches
    if data is None or not limit:
        raise MisconfigurationException(
            "An accuracy target measures a metric on the validation data, but this run has none: there is no "
            "val_dataloader, or limit_val_batches=0. Add validation data, or leave out accuracy_target."
        )
    combined = data if isinstance(data, CombinedLoader) else CombinedLoader(data, "sequential")
    if len(combined.flattened) != 1:
        raise MisconfigurationException(
            f"An accuracy target takes one validation loader, but this run has {len(combined.flattened)}. "
            "Pass keep_float=qat_lightning.keep_for_target(module, loader, metric) instead, with one of them."
        )
    (loader,) = combined.flattened
    if isinstance(limit, int):
        return _First(loader, limit)
    return loader if limit == 1.0 else _First(loader, int(limit * len(loader)))


def _check_trained(module: nn.Module) -> None:
    norms = [each for each in module.modules() if isinstance(each, BatchNorm) and each.track_running_stats]
    if norms and not any(_has_seen_data(each) for each in norms):
        raise TargetError(
            "An accuracy target compares int8 with the float network that the training starts from, but this "
            "network is not trained: no batch-norm in it has seen data, so its metric means nothing. Load "
            "trained weights first (on the command line weights=…), or leave out accuracy_target."
        )


def _has_seen_data(norm: Any) -> bool:
    return bool(norm.running_mean.any() or (norm.running_var != 1).any())
