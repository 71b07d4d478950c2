"""Your own images, one folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes
from torchvision.transforms import v2

from qat_lightning.tasks.data.base import ImageData, Splits, check_at_least
from qat_lightning.tasks.data.split import stratified_split
from qat_lightning.tasks.data.torchvision_data import normalised, split_train


class ImageFolderData(ImageData):
    """Images in `<data_dir>/train/<class>/`, and optionally in `val/` and `test/`.

    No image both selects a checkpoint and scores it:

    - `train/`, `val/` and `test/` are used as they are.
    - Without `test/`, the images in `val/` are the test split (ImageNet's layout), and the validation split
      is a stratified share of `train/`.
    - Without `val/`, the validation split is a stratified share of `train/`.
    - Without both, each is a stratified share of `train/`.

    Training images get a random resized crop and a flip. The other images are resized and cropped at the
    centre. The normalisation is ImageNet's, as torchvision's and most of timm's weights expect.

    Args:
        data_dir: Folder that holds `train/`.
        batch_size: Images per batch and process.
        num_workers: Loader processes. Decoding images keeps several busy.
        seed: Decides the order of the training batches and their augmentation, but not the split.
        image_size: Height and width after cropping.
        val_fraction: Share of `train/` for each split that has no folder, above 0 and below 0.5.

    Raises:
        FileNotFoundError: `train/` or its class folders are missing, or a class has no image.
        ValueError: A number is out of range, or `val/` or `test/` has other classes than `train/`.
    """

    def __init__(
        self,
        *,
        data_dir: str | Path,
        batch_size: int = 64,
        num_workers: int = 4,
        seed: int = 0,
        image_size: int = 224,
        val_fraction: float = 0.1,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_at_least("image_size", image_size, 8)
        if not 0 < val_fraction < 0.5:
            raise ValueError(f"val_fraction must be above 0 and below 0.5, but received {val_fraction}.")
        self.data_dir = Path(data_dir)
        self.image_size = image_size
        self.val_fraction = val_fraction
        if not (self.data_dir / "train").is_dir():
            raise FileNotFoundError(
                f"Images are expected in {self.data_dir}/train/<class>/, but there is no folder"
                f" {self.data_dir / 'train'}. Point data_dir at the folder that holds train/."
            )
        self.num_classes = len(_classes(self.data_dir / "train"))

    def make_splits(self) -> Splits:
        """Returns the splits as the class's documentation describes them."""
        augmented, plain = self._folder("train", augment=True), self._folder("train")
        if self._has("val") and self._has("test"):
            return Splits(augmented, self._folder("val"), self._folder("test"))
        for name in ("test", "val"):
            if self._has(name):
                test = self._folder(name)
                return split_train(augmented, plain, test, val_fraction=self.val_fraction)
        share = self.val_fraction
        train, val, test = stratified_split(augmented.targets, [1 - 2 * share, share, share])
        return Splits(Subset(augmented, train), Subset(plain, val), Subset(plain, test))

    def _has(self, name: str) -> bool:
        return (self.data_dir / name).is_dir()

    def _folder(self, name: str, *, augment: bool = False) -> Any:
        folder = ImageFolder(self.data_dir / name, self._transform(augment=augment))
        if name != "train":
            self._check_classes(name, folder.classes)
        return folder

    def _check_classes(self, name: str, classes: list[str]) -> None:
        expected = _classes(self.data_dir / "train")
        if classes != expected:
            odd = sorted(set(classes) ^ set(expected))
            raise ValueError(
                f"{self.data_dir / name} must hold the same class folders as train/, but"
                f" these are only in one of them: {', '.join(odd[:5])}."
            )

    def _transform(self, *, augment: bool) -> v2.Compose:
        size = self.image_size
        steps: list[v2.Transform] = [v2.Resize(size * 256 // 224), v2.CenterCrop(size)]
        if augment:
            steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        return v2.Compose([*steps, *normalised((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])


def _classes(folder: Path) -> list[str]:
    names: list[str] = find_classes(str(folder))[0]
    return names
