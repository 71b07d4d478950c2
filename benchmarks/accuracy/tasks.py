"""The tasks that accuracies are compared on: a network, images, and the float training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from examples.cifar10.networks import ResNet20, mobilenet_v2
from qat_lightning.tasks.data.digits import load_digits
from qat_lightning.tasks.models import DigitsCNN

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""The device that networks train on and training images lie on. Int8 always runs on the CPU."""


class Task(NamedTuple):
    """What to train and to test.

    Attributes:
        name: Its name in tables.
        build: Makes the network with fresh weights.
        train: Images and labels.
        test: Likewise.
        epochs: Epochs of float training before the comparison begins.
        tuning: Epochs that every method has after them, float among them.
        lr: Learning rate that the float training begins with.
        batch: Images in a step.
        augmented: Whether images are shifted and mirrored.
    """

    name: str
    build: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    epochs: int
    tuning: int
    lr: float
    batch: int
    augmented: bool

    @property
    def key(self) -> str:
        """Returns the task's name in the cache: fewer images or epochs make another task."""
        return f"{self.name}-{len(self.train[1])}-{self.epochs}-{self.tuning}"

    @property
    def steps(self) -> int:
        """Returns the number of steps in an epoch."""
        return len(self.train[1]) // self.batch

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Returns the batches of an epoch, the same for every method."""
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        images, labels = self.train
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order[: self.steps * self.batch].split(self.batch):
            batch = images[chosen]
            yield (augment(batch, generator) if self.augmented else batch), labels[chosen]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts each image by up to four pixels each way, and mirrors half of them."""
    count, _, height, width = images.shape
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    dy, dx = torch.randint(0, 9, (2, count), generator=generator)
    rows = (dy[:, None] + torch.arange(height))[:, None, :, None]
    columns = dx[:, None] + torch.arange(width)
    mirrored = torch.rand(count, generator=generator) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)[:, None, None, :]
    channels = torch.arange(images.shape[1])[None, :, None, None]
    return padded[torch.arange(count)[:, None, None, None], channels, rows, columns]


def tasks(images: Path | None, names: list[str], every: int = 1) -> Iterator[Task]:
    """Returns the tasks of these names.

    Args:
        images: Folder with train/<class>/ and test/<class>/ of images of 32x32, for those on photographs.
        names: Of `digits`, `resnet20` and `mobilenet_v2`.
        every: Train on every so-many-th photograph: an epoch of all takes minutes on two cores.
    """
    if "digits" in names:
        pixels, labels = load_digits()
        train = pixels[:1200].to(DEVICE), labels[:1200].to(DEVICE)
        test = pixels[1200:], labels[1200:]
        yield Task("digits", DigitsCNN, train, test, 30, 5, 0.05, 64, False)
    photographs = [name for name in names if name != "digits"]
    if photographs and images is not None:
        (pixels, labels), test = (read(images / split) for split in ("train", "test"))
        train = pixels[::every].to(DEVICE), labels[::every].to(DEVICE)
        if "resnet20" in names:
            yield Task("resnet20", ResNet20, train, test, 30, 5, 0.1, 128, True)
        if "mobilenet_v2" in names:
            # On two cores each epoch takes minutes.
            epochs, tuning = (30, 5) if DEVICE.type == "cuda" else (10, 1)
            yield Task("mobilenet_v2", mobilenet_v2, train, test, epochs, tuning, 0.1, 128, True)


def read(folder: Path) -> tuple[Tensor, Tensor]:
    """Returns all images of a folder, normalized, and their labels."""
    data = ImageFolder(str(folder), v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]))
    pairs = [data[i] for i in track(range(len(data)), f"reading {folder.name}", transient=True)]
    images = torch.stack([image for image, _ in pairs])
    return (images - 0.47) / 0.25, torch.tensor([label for _, label in pairs])
