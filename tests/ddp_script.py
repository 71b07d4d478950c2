"""A run on two gloo processes, each of which writes what it ended with: `ddp_script.py FOLDER [mistake]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.ao.quantization import DeQuantStub, QuantStub

from qat_lightning import PreflightError, QuantizationAwareTraining
from tests.networks import CLASSES
from tests.runs import TinyModule, dataset, loader, trainer
from tests.test_ranks import ranges


class Unequal(TinyModule):
    """The images of rank 1 are ten times as bright."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0] * 10**self.global_rank, batch[1]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def train_dataloader(self) -> Any:
        return loader(32, batch_size=4)


class PlainPlus(torch.nn.Module):
    """Adds int8 tensors by an operator, which eager mode cannot convert."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv = torch.nn.Conv2d(3, CLASSES, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.quant(x))
        return self.dequant(x + x).mean((2, 3))


def mistake(folder: Path) -> None:
    """Every process writes the error that ends its run."""
    runner = trainer(folder, QuantizationAwareTraining(), max_epochs=1, strategy="ddp", devices=2)
    try:
        runner.fit(TinyModule(PlainPlus()))
    except PreflightError as error:
        (folder / f"error{runner.global_rank}.txt").write_text(f"{error.line}\n{error}")
    leave_together()


def leave_together() -> None:
    """Leaves the process group, for gloo aborts the process that is still there when the other one exits."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(folder: Path) -> None:
    pl.seed_everything(0, verbose=False)
    qat = QuantizationAwareTraining(output_dir=folder / "out")
    module = Unequal(lr=0.001)
    runner = trainer(folder, qat, max_epochs=2, strategy="ddp", devices=2)
    runner.fit(module)
    assert qat.int8_module is not None
    result = {
        "ranges": ranges(module),
        "weights": {name: p.detach() for name, p in module.named_parameters()},
        "int8": qat.int8_module(dataset(8, seed=2).tensors[0]),
        "path": str(qat.int8_path),
    }
    torch.save(result, folder / f"rank{runner.global_rank}.pt")
    leave_together()


if __name__ == "__main__":
    (mistake if "mistake" in sys.argv else main)(Path(sys.argv[1]))
