"""Data modules with disjoint splits, and with training loaders that resume exactly.

Any LightningDataModule works with the callback. These ones add two things: training never sees the validation
and test images, which are the same in every run, and a checkpoint resumes at the very next batch.
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
