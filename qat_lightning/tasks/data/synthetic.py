"""Images generated from a seed, in any size, for smoke tests and timing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from qat_lightning.tasks.data.base import ImageData, Splits, check_at_least


class SyntheticData(ImageData):
    """Noise over one smooth random pattern per class, so that there is something to learn.

    Args:
        num_samples: Training images. Validation and test have a quarter of that each, at least one.
        num_classes: Number of classes. Sample i has the class i modulo this number.
        image_size: Height and width.
        channels: Channels of an image.
        batch_size: Images per batch and process.
        num_workers: Loader processes.
        seed: Decides the order of the training batches, but not the images.

    Raises:
        ValueError: A number is too small.
    """

    def __init__(
        self,
        *,
        num_samples: int = 512,
        num_classes: int = 10,
        image_size: int = 64,
        channels: int = 3,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_at_least("num_samples", num_samples, 1)
        check_at_least("num_classes", num_classes, 2)
        check_at_least("image_size", image_size, 4)
        check_at_least("channels", channels, 1)
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.shape = (channels, image_size, image_size)

    def make_splits(self) -> Splits:
        """Returns three datasets over the same patterns with different noise."""
        held_out = max(1, self.num_samples // 4)
        sizes = (self.num_samples, held_out, held_out)
        return Splits(*(_Patterns(n, self.num_classes, self.shape, i) for i, n in enumerate(sizes)))


class _Patterns(Dataset[tuple[Tensor, int]]):
    def __init__(self, num_samples: int, num_classes: int, shape: tuple[int, int, int], split: int) -> None:
        self.num_samples, self.num_classes, self.shape, self.split = (
            num_samples,
            num_classes,
            shape,
            split,
        )

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= self.num_samples:  # ends a plain `for` loop over the dataset
            raise IndexError(index)
        label = index % self.num_classes
        coarse = torch.randn(1, self.shape[0], 4, 4, generator=_generator(label))
        pattern = interpolate(coarse, size=self.shape[1:], mode="bilinear")[0]
        noise = torch.randn(self.shape, generator=_generator(index, self.split + 1))
        return pattern + noise, label

    def __len__(self) -> int:
        return self.num_samples


def _generator(index: int, stream: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed((index << 8) + stream)
