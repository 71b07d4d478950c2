"""Supports Lightning's weight averaging: computes the qparams of averaged weights.

`WeightAveraging` can average buffers like parameters. Averaged ranges are valid ranges, but averaged scales,
zero points and flags mean nothing. So the qparams of activations are computed from their averaged ranges. The
qparams of weights are computed from the averaged weights, because averaged ranges would lag behind them.
`StochasticWeightAveraging` ends with an epoch that estimates the batch-norm statistics of the averaged
weights. Observers are on in that epoch, so the qparams follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from qat_lightning.base.lightning_internals import averaged_model, averages_batch_norms
from qat_lightning.base.schedule import Phase
from qat_lightning.fake_quant.fake_quantize import FakeQuantize, fake_quantizes
from qat_lightning.fake_quant.ranges import has_histogram, has_range, set_range
from qat_lightning.modes.layers.fused_conv_bn import FusedConvBn
from qat_lightning.modes.layers.trained_layer import weight_rows
from qat_lightning.run import trainer_facts
from qat_lightning.run.distributed.merge_ranges import merge_ranges
from qat_lightning.run.part import Part

Average = Callable[[Any, Any, Any], Any]


class Averaging(Part):
    """Keeps the qparams of averaged weights correct. Does nothing without averaging."""

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        adopt(trainer)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        settle(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        settle(trainer, module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        settle(trainer, module)

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        finish(trainer, module)


def adopt(trainer: pl.Trainer) -> None:
    """Makes `WeightAveraging` average only floating-point buffers, and copy counters, zero points and flags.

    Raises:
        MisconfigurationException: The ranges of a network cannot be averaged.
    """
    for average in _averages(trainer):
        for name, child in fake_quantizes(average):
            if has_range(child) and (not isinstance(child, FakeQuantize) or has_histogram(child)):
                raise MisconfigurationException(
                    "Weight averaging needs ranges that can be averaged: a minimum and a maximum of fixed "
                    f"size, but {name.removeprefix('module.')!r} is a {type(child).__name__} with "
                    f"{type(child.activation_post_process).__name__}. Leave `qconfig` out, or make it of "
                    "qat_lightning's FakeQuantize with a minimum-maximum observer."
                )
        average.multi_avg_fn = _averaging_floats(average.multi_avg_fn, average.avg_fn)


def settle(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Computes the qparams of the average from its averaged ranges.

    If an averaged range is empty, that of `module` is used. Lightning averages after each step, and uses the
    average in validations, in checkpoints and at the end.
    """
    if trainer.state.fn != "fit":
        return
    for average in _averages(trainer):
        if next(average.parameters()).device == module.device:  # else the process group cannot exchange it
            merge_ranges(average)
        pairs = zip(fake_quantizes(average), fake_quantizes(module), strict=True)
        averaged: Any
        trained: Any
        for (_, averaged), (_, trained) in pairs:
            averaged.observer_enabled.copy_(trained.observer_enabled)
            averaged.fake_quant_enabled.copy_(trained.fake_quant_enabled)
            if not has_range(averaged):
                averaged.scale.copy_(trained.scale)
            elif found := _range(averaged) or _range(trained):
                set_range(averaged, *found)
        _compute_weight_qparams(average)


def finish(trainer: pl.Trainer, module: nn.Module) -> None:
    """Computes the qparams of the weights that SWA put into `module` at the end."""
    if any(isinstance(c, StochasticWeightAveraging) for c in trainer_facts.callbacks(trainer)):
        _compute_weight_qparams(module)


def adapt(trainer: pl.Trainer, phase: Phase) -> Phase:
    """Returns `phase`; while SWA estimates batch-norm statistics, these and observers are on."""
    estimating = any(
        isinstance(c, StochasticWeightAveraging)
        and averages_batch_norms(c)
        and trainer.current_epoch == c.swa_end + 1
        for c in trainer_facts.callbacks(trainer)
    )
    return phase._replace(observe=True, freeze_bn=False) if estimating else phase


def _averages(trainer: pl.Trainer) -> Iterator[AveragedModel]:
    for callback in trainer_facts.callbacks(trainer):
        average = averaged_model(callback) if isinstance(callback, WeightAveraging) else None
        if average is not None:
            yield average


def _range(fake_quantize: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns the observed range, or None if the observer saw no data."""
    observer = fake_quantize.activation_post_process
    low, high = observer.min_val, observer.max_val
    return (low, high) if bool(torch.isfinite(low).all() and torch.isfinite(high).all()) else None


@torch.no_grad()
def _compute_weight_qparams(module: nn.Module) -> None:
    """Computes the qparams of each weight from its magnitude, like a forward with observers on."""
    layer: Any
    for layer in module.modules():
        fake_quant = getattr(layer, "weight_fake_quant", None)
        if not isinstance(fake_quant, FakeQuantize) or fake_quant.axis != 0:
            continue
        if isinstance(layer, FusedConvBn):
            fake_quant.seen = False
            layer.observe_weight()
        elif not hasattr(layer, "bn"):
            fake_quant.observe(weight_rows(layer))


def _averaging_floats(many: Average | None, one: Average | None) -> Average:
    """Wraps an averaging function of `AveragedModel`: tensors that are not floating point are copied."""

    def one_by_one(averages: Any, values: Any, count: Any) -> None:
        assert one is not None
        for average, value in zip(averages, values, strict=True):
            average.copy_(one(average, value, count))

    given = many or (one_by_one if one is not None else get_swa_multi_avg_fn())

    @torch.no_grad()
    def update(averages: Any, values: Any, count: Any) -> None:
        if averages[0].is_floating_point():
            given(averages, values, count)
        else:
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)

    return update
