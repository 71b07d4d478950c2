"""Variants of the default recipe, one change at a time, on the same budget of epochs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.ao.quantization import QConfig
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize
from torch.ao.quantization.observer import MovingAverageMinMaxObserver

from benchmarks.accuracy.methods import BACKEND, Scores, epochs, forms
from benchmarks.accuracy.tasks import Task
from benchmarks.accuracy.training import train
from qat_lightning import Distillation, QuantizationAwareTraining
from qat_lightning.modes.qconfig import default_qconfig

RE_ESTIMATED_ON = 50
"""How many training batches batch-norm statistics are recomputed on."""


class Learned(QuantizationAwareTraining):
    """Learns the scales of activations (LSQ, Esser et al. 2020) after the calibration."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        calibrating = self.phase_at(trainer).observe
        super().on_train_batch_start(trainer, pl_module, *batch)
        for module in pl_module.modules():
            if isinstance(module, _LearnableFakeQuantize) and not calibrating:
                module.enable_param_learning()


def choice(kind: type[QuantizationAwareTraining] = QuantizationAwareTraining, **arguments: Any) -> Any:
    """Returns a method that gives the callback other arguments."""

    def method(task: Task, network: nn.Module, seed: int, lr: float) -> Scores:
        callback = kind(backend=BACKEND, convert=None, preflight=False, **arguments)
        return forms(task, train(task, network, seed, epochs(task), lr, callback=callback))

    return method


def re_estimated(task: Task, network: nn.Module, seed: int, lr: float) -> Scores:
    """Recomputes batch-norm statistics with the final weights (Wu & Johnson 2021, section 3)."""
    callback = QuantizationAwareTraining(backend=BACKEND, convert=None, preflight=False)
    prepared = train(task, network, seed, epochs(task), lr, callback=callback).train()
    norms = [m for m in prepared.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    with torch.no_grad():
        for images, _ in islice(task.batches(seed, epochs(task)[-1]), RE_ESTIMATED_ON):
            prepared(images)
    return forms(task, prepared.eval())


def learned() -> QConfig:
    """Quantizes activations with PyTorch's learnable fake-quantize, and weights as by default."""
    activation = _LearnableFakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver,
        quant_min=0,
        quant_max=255,
        dtype=torch.quint8,
        use_grad_scaling=True,
    )
    return QConfig(activation=activation, weight=default_qconfig(BACKEND).weight)


VARIANTS: dict[str, Callable[[Task, nn.Module, int, float], Scores]] = {
    "not calibrated": choice(calibration_steps=0),
    "observers frozen after calibration": choice(freeze_observers_at=0),
    "observers never frozen": choice(freeze_observers_at=None),
    "batch-norm frozen at 0.6": choice(freeze_bn_at=0.6),
    "batch-norm re-estimated": re_estimated,
    "learned steps": choice(Learned, qconfig=learned(), freeze_observers_at=0),
    "distilled": choice(distillation=Distillation()),
}
