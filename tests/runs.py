"""A tiny LightningModule, its data, and Trainers that write nothing but checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.networks import CLASSES, SIZE, Residual


def dataset(count: int = 48, seed: int = 0) -> TensorDataset:
    """Images whose class shows as their brightness, channel by channel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    x = 0.5 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return TensorDataset(x + labels.view(-1, 1, 1, 1) - 1.5, labels)


def loader(count: int = 48, *, seed: int = 0, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset(count, seed), **{"batch_size": 8, **options})


class TinyModule(pl.LightningModule):
    """Classifies with a network, and logs loss and accuracy.

    Args:
        network: The network; a `Residual` by default.
        lr: Learning rate.
    """

    def __init__(self, network: nn.Module | None = None, lr: float = 0.05) -> None:
        super().__init__()
        self.model = Residual() if network is None else network
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(16, seed=1)

    def test_dataloader(self) -> DataLoader[Any]:
        return loader(32, seed=2)


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(**{**quiet, **options}, callbacks=list(callbacks))
