"""What all data modules share: three splits and their loaders."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from qat_lightning.tasks.data.resumable import ResumableLoader


class Splits(NamedTuple):
    """Disjoint datasets of (image, label): to train on, to select by, and to score with."""

    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]


class ImageData(LightningDataModule):
    """Loaders of (images, labels) over three disjoint splits, which a subclass makes.

    Images are float32, batch x channels x height x width, normalised; labels are int64 from 0.

    Args:
        batch_size: Images per batch and process, at least 1.
        num_workers: Loader processes; 0 loads in the training process, best where the data is in
            memory.
        seed: Names the order of the training batches and their augmentation, and nothing else.
            Above all not the split: weights from a run with one seed can be scored in a run with
            another.

    Raises:
        ValueError: If `batch_size` is below 1, or `num_workers` or `seed` is negative.
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
        """Returns the three datasets; called once, on every process."""
        raise NotImplementedError

    @property
    def splits(self) -> Splits:
        """The three datasets, made at first use."""
        if self._splits is None:
            self._splits = self.make_splits()
        return self._splits

    def setup(self, stage: str | None = None) -> None:
        """Makes the splits, so that what is wrong with the data shows before training."""
        _ = self.splits

    def train_dataloader(self) -> ResumableLoader:
        """Returns this process's share of the shuffled training data, exact on resume."""
        share = (self.trainer and self.trainer.distributed_sampler_kwargs) or {}
        return ResumableLoader(self.splits.train, self.batch_size, seed=self.seed, **share, **self._options())

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns the validation data in order."""
        return self._in_order(self.splits.val)

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns the test data in order."""
        return self._in_order(self.splits.test)

    def _in_order(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        # With its own generator, an evaluation leaves the global one as it was.
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
        raise ValueError(f"{name} is at least {minimum}, got {value}.")
