"""The base class of all data modules: three splits and their loaders."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from qat_lightning.tasks.data.resumable import ResumableLoader


class Splits(NamedTuple):
    """Disjoint datasets of (image, label): for training, for choosing a checkpoint, and for scoring it."""

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]


class ImageData(LightningDataModule):
    """Loaders of (images, labels) over three disjoint splits. A subclass makes the splits.

    Images are float32, batch x channels x height x width, normalised; labels are int64 from 0.

    Args:
        batch_size: Images per batch and process, at least 1.
        num_workers: Loader processes. 0 loads in the training process, which is best if the data is in
            memory.
        seed: Decides the order of the training batches and their augmentation, and nothing else. The split
            does not depend on it, so weights from a run with one seed can be scored in a run with another.

    Raises:
        ValueError: `batch_size` is below 1, or `num_workers` or `seed` is negative.
    """

    #: Number of classes.
    num_classes: int

    def __init__(self, *, batch_size: int = 64, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        check_at_least("batch_size", batch_size, 1)
        check_at_least("num_workers", num_workers, 0)
        check_at_least("seed", seed, 0)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._splits: Splits | None = None

    def make_splits(self) -> Splits:
        """Returns the three datasets. It is called once on every process."""
        raise NotImplementedError

    @property
    def splits(self) -> Splits:
        """The three datasets. They are made at the first use."""
        if self._splits is None:
            self._splits = self.make_splits()
        return self._splits

    def setup(self, stage: str | None = None) -> None:
        """Makes the splits, so that an error in the data is raised before training."""
        _ = self.splits

    def train_dataloader(self) -> ResumableLoader:
        """Returns a loader of this process's share of the shuffled training data. It resumes exactly."""
        share = (self.trainer and self.trainer.distributed_sampler_kwargs) or {}
        return ResumableLoader(self.splits.train, self.batch_size, seed=self.seed, **share, **self._options())

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns a loader of the validation data, in order."""
        return self._in_order(self.splits.val)

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns a loader of the test data, in order."""
        return self._in_order(self.splits.test)

    def _in_order(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        # With its own generator, the loader does not change the global one.
        return DataLoader(dataset, self.batch_size, generator=torch.Generator(), **self._options())

    def _options(self) -> dict[str, Any]:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": on_gpu,
        }


def check_at_least(name: str, value: int, minimum: int) -> None:
    """Raises a ValueError that names the argument if `value` is below `minimum`."""
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, but received {value}.")
