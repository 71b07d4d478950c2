"""Photographs of 32x32 in one folder per class: FOLDER/train/<class>/ and FOLDER/test/<class>/."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

Loader = DataLoader[tuple[Tensor, Tensor]]


class Photographs(LightningDataModule):
    """Batches of photographs; every tenth of train/ is left for validation.

    Args:
        folder: Holds train/ and test/.
        batch: Images in each.
        workers: Loader processes.
    """

    def __init__(self, folder: Path, batch: int = 128, workers: int = 2) -> None:
        super().__init__()
        plain = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.47] * 3, [0.25] * 3)]
        shifted = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
        train = ImageFolder(folder / "train", v2.Compose([*shifted, *plain]))
        self.test = ImageFolder(folder / "test", v2.Compose(plain))
        self.classes = train.classes
        held_out = range(0, len(train), 10)  # the folder is sorted by class, so this takes as many of each
        self.train = Subset(train, sorted({*range(len(train))} - {*held_out}))
        self.val = Subset(ImageFolder(folder / "train", v2.Compose(plain)), held_out)
        self.batch, self.workers = batch, workers

    def train_dataloader(self) -> Loader:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> Loader:
        return self._loader(self.val)

    def test_dataloader(self) -> Loader:
        return self._loader(self.test)

    def _loader(self, data: Subset[tuple[Tensor, Tensor]] | ImageFolder, *, shuffle: bool = False) -> Loader:
        return DataLoader(
            data,
            batch_size=self.batch,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )
