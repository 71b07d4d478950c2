"""Data modules with honest splits, whose training loaders resume exactly.

Any LightningDataModule works with the callback. What these add: validation and test images that
training never saw, the same in every run, and a training order that a checkpoint continues at the
very next batch.
"""

from qat_lightning.tasks.data.base import ImageData, Splits
from qat_lightning.tasks.data.digits import DigitsData
from qat_lightning.tasks.data.image_folder import ImageFolderData
from qat_lightning.tasks.data.resumable import EpochSampler, ResumableLoader, SeededDataset
from qat_lightning.tasks.data.split import stratified_split
from qat_lightning.tasks.data.synthetic import SyntheticData
from qat_lightning.tasks.data.torchvision_data import CIFAR10Data, FashionMNISTData

__all__ = [
    "CIFAR10Data",
    "DigitsData",
    "EpochSampler",
    "FashionMNISTData",
    "ImageData",
    "ImageFolderData",
    "ResumableLoader",
    "SeededDataset",
    "Splits",
    "SyntheticData",
    "stratified_split",
]
