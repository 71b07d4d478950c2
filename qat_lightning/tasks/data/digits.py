"""The 1,797 handwritten digits that ship inside scikit-learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from qat_lightning.base.errors import MissingExtraError
from qat_lightning.tasks.data.base import ImageData, Splits, check_at_least
from qat_lightning.tasks.data.split import stratified_split

_FRACTIONS = (0.6, 0.2, 0.2)
_MEAN, _STD = 0.305, 0.376  # of the training split, with pixels in [0, 1]


class DigitsData(ImageData):
    """Real 8x8 digits without a download: 1,078 for training, 360 for validation, 359 for test.

    The split is stratified and always the same. Training images are shifted at random by up to one pixel.

    Args:
        batch_size: Images per batch and process.
        num_workers: Loader processes. The data is in memory, so 0 is fastest.
        seed: Decides the order of the training batches and their shifts, but not the split.
        image_size: Height and width. Images are resized if it is not 8. Use a larger size for networks that
            halve the image often.
        channels: 1, or 3 for networks that expect colour.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ValueError: A number is too small, or `channels` is not 1 or 3.
    """

    num_classes = 10

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        image_size: int = 8,
        channels: int = 1,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_at_least("image_size", image_size, 8)
        check_channels(channels)
        self.image_size = image_size
        self.channels = channels

    def make_splits(self) -> Splits:
        """Returns the stratified 60/20/20 split."""
        images, labels = load_digits()
        train, val, test = stratified_split(labels.tolist(), _FRACTIONS)
        shift, keep = [v2.RandomCrop(8, padding=1)], list[v2.Transform]()
        return Splits(
            _Images(images[train], labels[train], self._transform(shift)),
            _Images(images[val], labels[val], self._transform(keep)),
            _Images(images[test], labels[test], self._transform(keep)),
        )

    def _transform(self, augment: list[v2.Transform]) -> v2.Compose:
        steps = [*augment, v2.Normalize([_MEAN], [_STD])]
        if self.image_size != 8:
            steps.append(v2.Resize(self.image_size, antialias=True))
        if self.channels == 3:
            steps.append(v2.Grayscale(3))
        return v2.Compose(steps)


def load_digits() -> tuple[Tensor, Tensor]:
    """Returns images (float32, 1797x1x8x8, in [0, 1]) and labels (int64, 1797) from scikit-learn.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "digits", "Loading the digits") from error
    bunch = load()
    images = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.as_tensor(bunch.target, dtype=torch.int64)


def check_channels(channels: int) -> None:
    """Raises a ValueError if `channels` is neither 1 nor 3."""
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (grey repeated), but received {channels}.")


class _Images(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: Tensor, labels: Tensor, transform: v2.Compose) -> None:
        self.images = images
        self.labels = labels.tolist()
        self.transform = transform

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.images[index]), self.labels[index]

    def __len__(self) -> int:
        return len(self.images)
