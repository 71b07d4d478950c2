"""A float network and its int8 form on photographs of 32x32, and what each method costs in accuracy.

    python -m examples.cifar10.train FOLDER                                 # ResNet-20, 30 + 5 epochs
    python -m examples.cifar10.train FOLDER --network mobilenet_v2 --epochs 6 --qat-epochs 2

FOLDER holds train/<class>/ and test/<class>/, such as CIFAR-10 written out as files. The network is trained
in float; then once more in float, and once for int8 from the same weights, for as many epochs.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from examples.cifar10.data import Photographs
from examples.cifar10.networks import ResNet20, mobilenet_v2
from qat_lightning import PostTrainingQuantization, QuantizationAwareTraining

NETWORKS = {"resnet20": ResNet20, "mobilenet_v2": mobilenet_v2}


class Classifier(LightningModule):
    """A classifier trained by SGD with a cosine schedule, without any code for quantization.

    Args:
        network: Takes images, (N, 3, 32, 32), gives logits.
        classes: Their number.
        lr: Learning rate at the start.
    """

    def __init__(self, network: nn.Module, classes: int, lr: float) -> None:
        super().__init__()
        self.network, self.classes, self.lr = network, classes, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._log("val/accuracy", batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._log("test/accuracy", batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}

    def _log(self, name: str, batch: list[Tensor]) -> None:
        images, labels = batch
        score = multiclass_accuracy(self.network(images), labels, self.classes, average="micro")
        self.log(name, score, batch_size=len(labels), prog_bar=True)


def main() -> None:
    """Trains, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--epochs", type=int, default=30, help="of float training")
    parser.add_argument("--qat-epochs", type=int, default=5, help="after them, in float and for int8")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of the float training")
    parser.add_argument("--qat-lr", type=float, default=0.002, help="and of what comes after it")
    parser.add_argument("--batch", type=int, default=128, help="images in a step")
    parser.add_argument("--backend", default="onednn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/cifar10"))
    args = parser.parse_args()
    seed_everything(args.seed)
    data = Photographs(args.folder, args.batch)
    network = NETWORKS[args.network](len(data.classes))
    float_module = Classifier(network, len(data.classes), args.lr)
    fit(float_module, data, args.epochs)

    # The weights are good already and only have to adapt to rounding: hence the low learning rate.
    float_module.lr = args.qat_lr
    trained = copy.deepcopy(float_module)
    qat = QuantizationAwareTraining(
        backend=args.backend, export=["torch", "onnx"], output_dir=args.output / args.network
    )
    fit(trained, data, args.qat_epochs, qat)
    fit(float_module, data, args.qat_epochs)  # for a comparison on the same budget
    ptq = PostTrainingQuantization(backend=args.backend)
    tester(callbacks=[ptq], limit_val_batches=8).validate(float_module, data, verbose=False)

    table = Table(
        "network", "test accuracy, %", title=f"{args.network}, {args.epochs} + {args.qat_epochs} epochs"
    )
    scored = {"float": float_module, "int8 without training": ptq.int8_module, "int8": qat.int8_module}
    for path in qat.exported:
        fresh = Classifier(NETWORKS[args.network](len(data.classes)), len(data.classes), args.qat_lr)
        scored[path.name] = qat.shipped(fresh, path)
    for name, module in scored.items():
        (result,) = tester().test(module, data, verbose=False)
        table.add_row(name, f"{100 * result['test/accuracy']:.2f}")
    Console().print(table)


def fit(module: Classifier, data: Photographs, epochs: int, *callbacks: Any) -> None:
    """Trains a module, on a GPU if there is one."""
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[RichProgressBar(leave=True), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)


def tester(**arguments: Any) -> Trainer:
    """A Trainer on the CPU, where int8 runs."""
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **arguments)


if __name__ == "__main__":
    main()
