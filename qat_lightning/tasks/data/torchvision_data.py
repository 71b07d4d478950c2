"""Datasets that torchvision downloads: Fashion-MNIST and CIFAR-10."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from torchvision import datasets
from torchvision.transforms import v2

from qat_lightning.tasks.data.base import ImageData, Splits, check_at_least
from qat_lightning.tasks.data.digits import check_channels
from qat_lightning.tasks.data.split import stratified_split


class _Downloaded(ImageData):
    """A torchvision dataset. A stratified tenth of its training images is the validation split."""

    num_classes = 10
    dataset: Callable[..., Any]

    def __init__(
        self, *, data_dir: str | Path, batch_size: int, num_workers: int, seed: int, image_size: int
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_at_least("image_size", image_size, 8)
        self.data_dir = Path(data_dir)
        self.image_size = image_size

    def prepare_data(self) -> None:
        """Downloads the files that are missing from `data_dir`, in one process per machine."""
        self.dataset(self.data_dir, train=True, download=True)
        self.dataset(self.data_dir, train=False, download=True)

    def make_splits(self) -> Splits:
        """Returns nine tenths of the training images, the last tenth of them, and the test images."""
        augmented = self.dataset(self.data_dir, train=True, transform=self.transform(augment=True))
        plain = self.dataset(self.data_dir, train=True, transform=self.transform(augment=False))
        test = self.dataset(self.data_dir, train=False, transform=self.transform(augment=False))
        return split_train(augmented, plain, test, val_fraction=0.1)

    def transform(self, *, augment: bool) -> v2.Compose:
        """Returns a transform from a PIL image to a normalised float32 tensor."""
        raise NotImplementedError

    def _resize(self, native: int) -> list[v2.Transform]:
        return [] if self.image_size == native else [v2.Resize(self.image_size, antialias=True)]


class FashionMNISTData(_Downloaded):
    """Fashion-MNIST, 10 classes of grey images: 54,000 train, 6,000 validation, 10,000 test.

    Training images are shifted by up to two pixels and flipped.

    Args:
        data_dir: Folder to download into (30 MB) and read from.
        batch_size: Images per batch and process.
        num_workers: Loader processes.
        seed: Decides the order of the training batches and their augmentation, but not the split.
        image_size: Height and width. Images are resized if it is not 28.
        channels: 3, as torchvision's networks expect, or 1.

    Raises:
        ValueError: A number is too small, or `channels` is not 1 or 3.
    """

    dataset = datasets.FashionMNIST

    def __init__(
        self,
        *,
        data_dir: str | Path = "data",
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        image_size: int = 28,
        channels: int = 3,
    ) -> None:
        super().__init__(
            data_dir=data_dir,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            image_size=image_size,
        )
        check_channels(channels)
        self.channels = channels

    def transform(self, *, augment: bool) -> v2.Compose:
        """Returns the steps: with `augment` a crop and a flip, then tensor, normalisation and channels."""
        steps = [v2.RandomCrop(28, padding=2), v2.RandomHorizontalFlip()] if augment else []
        grey = [v2.Grayscale(3)] if self.channels == 3 else []
        mean, std = [0.2860] * self.channels, [0.3530] * self.channels
        return v2.Compose([*steps, *self._resize(28), *grey, *normalised(mean, std)])


class CIFAR10Data(_Downloaded):
    """CIFAR-10, 10 classes of colour images: 45,000 train, 5,000 validation, 10,000 test.

    Training images are shifted by up to four pixels and flipped.

    Args:
        data_dir: Folder to download into (170 MB) and read from.
        batch_size: Images per batch and process.
        num_workers: Loader processes.
        seed: Decides the order of the training batches and their augmentation, but not the split.
        image_size: Height and width. Images are resized if it is not 32.

    Raises:
        ValueError: A number is too small.
    """

    dataset = datasets.CIFAR10

    def __init__(
        self,
        *,
        data_dir: str | Path = "data",
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        image_size: int = 32,
    ) -> None:
        super().__init__(
            data_dir=data_dir,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            image_size=image_size,
        )

    def transform(self, *, augment: bool) -> v2.Compose:
        """Returns the steps: with `augment` a crop and a flip, then tensor and normalisation."""
        steps = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if augment else []
        mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
        return v2.Compose([*steps, *self._resize(32), *normalised(mean, std)])


def normalised(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    """Returns the steps from a PIL image to a normalised float32 tensor."""
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]


def split_train(augmented: Any, plain: Dataset[Any], test: Dataset[Any], *, val_fraction: float) -> Splits:
    """Splits a stratified share off the training data, for validation without augmentation.

    Args:
        augmented: The training data with random transforms and a `targets` list of labels.
        plain: The same samples without random transforms.
        test: The test data. It is not changed.
        val_fraction: Share of the training data that becomes the validation split, above 0 and below 1.

    Raises:
        ValueError: One of the two parts would be empty.
    """
    labels = [int(label) for label in augmented.targets]
    train, val = stratified_split(labels, [1 - val_fraction, val_fraction])
    return Splits(Subset(augmented, train), Subset(plain, val), test)
