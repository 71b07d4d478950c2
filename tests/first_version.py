"""Writes, by `python -m tests.first_version`, the files that later versions are held to read.

Run once, by 0.1.0; what it wrote lies in `tests/data/0.1.0`. The networks here stay as they are, since the
files fit them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.ao.quantization import DeQuantStub, QuantStub
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from qat_lightning import QuantizationAwareTraining, save_int8
from qat_lightning.tasks.data import ResumableLoader
from tests.runs import trainer

FOLDER = Path(__file__).parent / "data" / "0.1.0"
STEPS = 4


class Plain(nn.Module):
    """Without a word of quantization, for fx mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = F.relu(self.block(x) + x)
        return self.head(self.drop(F.adaptive_avg_pool2d(x, 1).flatten(1)))


class Stubbed(nn.Module):
    """With stubs, for eager mode."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn(self.conv(self.quant(x)))))
        return self.dequant(self.head(x.flatten(1)))


NETWORKS: dict[str, type[nn.Module]] = {"fx": Plain, "eager": Stubbed}


def inputs(count: int = 32) -> Tensor:
    """Images that no random generator makes, so that they are the same everywhere."""
    wave = torch.arange(count * 3 * 36, dtype=torch.float64).mul(0.7).sin().reshape(count, 3, 6, 6)
    return (wave * torch.arange(1, count + 1).reshape(-1, 1, 1, 1) / count).float()


class Module(pl.LightningModule):
    """Trains one of the networks."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(TensorDataset(inputs(), torch.arange(32) % 3), 8)

    def val_dataloader(self) -> ResumableLoader:
        return ResumableLoader(TensorDataset(inputs(16), torch.arange(16) % 3), 8)


class SaveAt(pl.Callback):
    """Writes a checkpoint at the end of a step; not a ModelCheckpoint, whose state has paths in it."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def qat() -> QuantizationAwareTraining:
    """The callback of all runs."""
    return QuantizationAwareTraining(convert="last", freeze_observers_at=0.5, freeze_bn_at=2, export=[])


def main(folder: Path) -> None:
    """Trains both networks for three epochs; the checkpoint is of the last batch of the second."""
    folder.mkdir(parents=True, exist_ok=True)
    outputs = {}
    for mode, network in NETWORKS.items():
        pl.seed_everything(0, verbose=False)
        callback, module = qat(), Module(network())
        saver = SaveAt(2 * STEPS, folder / f"{mode}.ckpt")
        options: dict[str, Any] = {"enable_checkpointing": False, "max_epochs": 3}
        trainer(folder, callback, saver, **options).fit(module)
        assert callback.int8_module is not None
        save_int8(callback.int8_module, folder / f"{mode}-int8.pt")
        outputs[mode] = {
            "fake_quant": module.eval()(inputs()).detach(),
            "int8": callback.int8_module(inputs()),
        }
    torch.save(outputs, folder / "outputs.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
