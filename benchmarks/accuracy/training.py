"""The training that all methods share, and the accuracy that they are compared by."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.accuracy.tasks import DEVICE, Task


class Epoch(IterableDataset[tuple[Tensor, Tensor]]):
    """The batches of one epoch, whose number is known."""

    def __init__(self, task: Task, seed: int, epoch: int) -> None:
        self.task, self.seed, self.epoch = task, seed, epoch

    def __len__(self) -> int:
        return self.task.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.task.batches(self.seed, self.epoch)


class Classifier(LightningModule):
    """Trains a network by SGD with a cosine schedule that ends at 0 after the last step.

    Args:
        task: The data.
        network: What to train.
        seed: Of the order of the images and their augmentation.
        epochs: Numbers of the epochs, which with `seed` name their batches.
        lr: Learning rate at the start.
        schedule: Whether the rate falls; else it stays.
    """

    def __init__(
        self, task: Task, network: nn.Module, seed: int, epochs: list[int], lr: float, schedule: bool
    ) -> None:
        super().__init__()
        self.network = network
        self.task, self.seed, self.epochs, self.lr, self.schedule = task, seed, epochs, lr, schedule

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(Epoch(self.task, self.seed, self.epochs[self.current_epoch]), batch_size=None)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        images = images.contiguous(memory_format=torch.channels_last)
        return nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(self.network.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
        if not self.schedule:
            return optimizer
        falling = CosineAnnealingLR(optimizer, self.task.steps * len(self.epochs))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


def train(
    task: Task,
    network: nn.Module,
    seed: int,
    epochs: Iterable[int],
    lr: float,
    *,
    callback: Callback | None = None,
    schedule: bool = True,
) -> nn.Module:
    """Trains a network, in channels-last: on CPUs a quarter faster, for every method.

    Args:
        task: As in :class:`Classifier`, like the other arguments.
        network: Likewise.
        seed: Likewise.
        epochs: Likewise.
        lr: Likewise.
        callback: What is to happen on the way.
        schedule: As in :class:`Classifier`.

    Returns:
        The network in eval mode, on the device it was trained on. The callback may have put it in the place
        of the one given.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    module = Classifier(task, network.to(memory_format=torch.channels_last), seed, list(epochs), lr, schedule)
    trainer = Trainer(
        accelerator=DEVICE.type,
        devices=1,
        max_epochs=len(module.epochs),
        callbacks=callback,
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return module.network.eval().to(DEVICE)


class At(Callback):
    """Does something to the network once a share of the training is done, and keeps to it.

    Args:
        points: Shares from 0 to 1, and what to do.
    """

    def __init__(self, points: dict[float, Callable[[nn.Module], object]]) -> None:
        self.points = points

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        for share, do in self.points.items():
            if trainer.global_step >= share * trainer.estimated_stepping_batches:
                do(pl_module.get_submodule("network"))


@torch.no_grad()
def outputs(network: nn.Module, images: Tensor) -> Tensor:
    """Returns the logits of all images, on the network's device; int8 has no parameters: the CPU."""
    device = next(network.parameters(), images).device
    return torch.cat([network(batch.to(device)).cpu() for batch in images.split(250)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Returns the percentage of right predictions."""
    return 100 * (logits.argmax(1) == labels).float().mean().item()
