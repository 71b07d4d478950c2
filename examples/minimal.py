"""Int8 training with your own LightningModule and Trainer: add the callback, and nothing else changes."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qat_lightning import QuantizationAwareTraining


class Module(LightningModule):
    """A small convolutional classifier, without any code for quantization."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


if __name__ == "__main__":
    images = torch.randn(512, 1, 8, 8)
    labels = (images[:, 0, :, 1:] * images[:, 0, :, :-1]).mean((1, 2)).gt(0).long()
    train = DataLoader(TensorDataset(images[:384], labels[:384]), batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(images[384:], labels[384:]), batch_size=64)

    qat = QuantizationAwareTraining(backend="x86")
    trainer = Trainer(max_epochs=10, accelerator="cpu", callbacks=[qat], logger=False)
    trainer.fit(Module(), train)

    print(f"int8 file: {qat.int8_path}")
    Trainer(accelerator="cpu", logger=False).test(qat.int8_module, test)
