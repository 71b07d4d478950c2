"""Runs whose network has a layer that int8 ruins, and that a target therefore keeps float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from qat_lightning import AccuracyTarget, QuantizationAwareTraining
from qat_lightning.quantize.recipe import recipe_of
from tests.ruined import Row, data, fidelity, ruin_weight, seeded
from tests.runs import TinyModule, trainer

METRIC = "val_fidelity"
DROP = 8.0
STEPS = 4


class Faithful(TinyModule):
    """Learns to be what its network was before training, and logs how near to that it is."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, lr=1e-6)
        self.own = data(network)
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0] + 0.01 * torch.randn_like(batch[0])), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.mean(fidelity(self(batch[0]), batch))
        self.log(METRIC, self.mean)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.own.dataset, batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.own


def bad() -> Faithful:
    """Its `third.0` is ruined by int8."""
    return Faithful(ruin_weight(seeded(Row)))


def good() -> Faithful:
    """Nothing in it is."""
    return Faithful(seeded(Row))


def fresh() -> Faithful:
    """Has other weights at every call, and no layer that stands out."""
    return Faithful(Row())


TARGET = AccuracyTarget(DROP)


def callback(target: AccuracyTarget | None = TARGET, **options: Any) -> QuantizationAwareTraining:
    quick: Any = {"convert": None, "preflight": False}
    return QuantizationAwareTraining(accuracy_target=target, **{**quick, **options})


def fit(
    folder: Path,
    module: pl.LightningModule,
    *extra: pl.Callback,
    qat: QuantizationAwareTraining | None = None,
    announced: Path | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> QuantizationAwareTraining:
    """Trains with a checkpoint after each epoch, and returns the callback."""
    qat = qat or callback()
    best = ModelCheckpoint(folder, monitor=METRIC, mode="max", save_top_k=-1, filename="{epoch}")
    runner = trainer(folder, qat, best, *extra, **{"max_epochs": 2, **options})
    if announced is not None:
        runner.ckpt_path = announced
    runner.fit(module, ckpt_path=ckpt_path)
    return qat


def kept(module: Any) -> tuple[str, ...]:
    """What the recipe of the module's network keeps float."""
    recipe = recipe_of(module.model)
    assert recipe is not None
    return recipe.keep_float
