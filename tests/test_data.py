from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from qat_lightning.tasks.data import (
    CIFAR10Data,
    DigitsData,
    FashionMNISTData,
    ImageData,
    ImageFolderData,
    SyntheticData,
    stratified_split,
)

# The split


@pytest.mark.parametrize("seed", [0, 1])
def test_split_is_disjoint_complete_and_keeps_class_shares(seed: int) -> None:
    labels = [0] * 50 + [1] * 30 + [2] * 20
    parts = stratified_split(labels, [0.6, 0.2, 0.2], seed=seed)
    assert sorted(index for part in parts for index in part) == list(range(100))
    shares = [Counter(labels[index] for index in part) for part in parts]
    assert shares == [{0: 30, 1: 18, 2: 12}, {0: 10, 1: 6, 2: 4}, {0: 10, 1: 6, 2: 4}]


def test_split_follows_its_seed() -> None:
    labels = [0, 1] * 50
    first = stratified_split(labels, [0.5, 0.5], seed=3)
    assert first == stratified_split(labels, [0.5, 0.5], seed=3)
    assert first != stratified_split(labels, [0.5, 0.5], seed=4)


@pytest.mark.parametrize("fractions", [[0.9, 0.2], [1.0, 0.0], [1.1, -0.1]])
def test_split_refuses_impossible_fractions(fractions: list[float]) -> None:
    with pytest.raises(ValueError, match="above 0 and add up to at most 1"):
        stratified_split([0] * 10, fractions)


def test_split_refuses_an_empty_part() -> None:
    with pytest.raises(ValueError, match="a part would be empty"):
        stratified_split([0, 1, 2], [0.9, 0.1])


# The data modules


def batch_of(loader: Any) -> tuple[tuple[int, ...], torch.dtype, torch.dtype]:
    images, labels = next(iter(loader))
    return tuple(images.shape), images.dtype, labels.dtype


def check_shapes(data: ImageData, *shape: int) -> None:
    expected = (data.batch_size, *shape), torch.float32, torch.int64
    assert batch_of(data.train_dataloader()) == expected
    assert batch_of(data.val_dataloader()) == expected
    assert batch_of(data.test_dataloader()) == expected


def test_digits_are_split_honestly() -> None:
    data, other = DigitsData(seed=0), DigitsData(seed=1)
    data.setup()
    assert [len(part) for part in data.splits] == [1078, 360, 359]  # type: ignore[arg-type]
    images = [part.images for part in data.splits]  # type: ignore[attr-defined]
    keys = [{image.numpy().tobytes() for image in part} for part in images]
    assert not keys[0] & keys[1]
    assert not (keys[0] | keys[1]) & keys[2]
    for part in data.splits:
        counts = Counter[int](part.labels)  # type: ignore[attr-defined]
        assert max(counts.values()) <= 1.1 * min(counts.values())
    assert torch.equal(images[2], other.splits.test.images)  # type: ignore[attr-defined]


def test_digits_are_normalised_and_augmented_in_training_alone() -> None:
    data = DigitsData(batch_size=16)
    check_shapes(data, 1, 8, 8)
    values = torch.stack([image for image, _ in data.splits.val])  # type: ignore[attr-defined]
    assert values.mean().abs() < 0.05
    assert abs(values.std() - 1) < 0.05
    train = data.train_dataloader()
    first = next(iter(train))
    train.sampler.set_epoch(1)  # type: ignore[attr-defined]
    assert not torch.equal(first[0], next(iter(train))[0])
    assert torch.equal(next(iter(data.val_dataloader()))[0], next(iter(data.val_dataloader()))[0])


def test_digits_in_the_format_of_large_networks() -> None:
    check_shapes(DigitsData(batch_size=4, image_size=32, channels=3), 3, 32, 32)


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "qat-lightning\[digits\]"'):
        DigitsData().setup()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_same_with_any_number_of_workers(num_workers: int) -> None:
    expected = DigitsData(batch_size=512).train_dataloader()
    batches = DigitsData(batch_size=512, num_workers=num_workers).train_dataloader()
    for (images, labels), (same, also) in zip(expected, batches, strict=True):
        assert torch.equal(images, same)
        assert torch.equal(labels, also)


def test_synthetic_images_are_always_the_same() -> None:
    data = SyntheticData(num_samples=8, num_classes=3, image_size=16, channels=2, batch_size=2)
    check_shapes(data, 2, 16, 16)
    assert [len(part) for part in data.splits] == [8, 2, 2]  # type: ignore[arg-type]
    again = SyntheticData(num_samples=8, num_classes=3, image_size=16, channels=2, seed=7)
    image, label = data.splits.train[4]
    assert label == 1
    assert torch.equal(image, again.splits.train[4][0])
    assert not torch.equal(image, data.splits.train[1][0])


def fashion_mnist(folder: Path) -> None:
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 100), ("t10k", 20)):
        labels = bytes(index % 10 for index in range(count))
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + bytes(count * 28 * 28))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels)


@pytest.mark.parametrize(("channels", "size"), [(3, 28), (1, 32)])
def test_fashion_mnist(tmp_path: Path, channels: int, size: int) -> None:
    fashion_mnist(tmp_path)
    data = FashionMNISTData(data_dir=tmp_path, batch_size=8, channels=channels, image_size=size)
    data.prepare_data()  # finds the files and downloads nothing
    check_shapes(data, channels, size, size)
    assert [len(part) for part in data.splits] == [90, 10, 20]  # type: ignore[arg-type]


def test_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(Dataset[Any]):
        def __init__(self, root: Path, *, train: bool, transform: Any = None) -> None:
            self.targets = list(range(10)) * (10 if train else 2)
            self.transform = transform

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, index: int) -> Any:
            return self.transform(Image.new("RGB", (32, 32))), self.targets[index]

    monkeypatch.setattr(CIFAR10Data, "dataset", Small)
    check_shapes(CIFAR10Data(batch_size=8), 3, 32, 32)
    check_shapes(CIFAR10Data(batch_size=8, image_size=40), 3, 40, 40)


def image_folder(folder: Path, *, classes: str = "ab", count: int = 10) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (40, 30), (index, 0, 0)).save(folder / name / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    ("folders", "sizes"),
    [
        (("train",), (16, 2, 2)),
        (("train", "val"), (18, 2, 20)),
        (("train", "test"), (18, 2, 20)),
        (("train", "val", "test"), (20, 20, 20)),
    ],
)
def test_image_folder_layouts(tmp_path: Path, folders: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    for name in folders:
        image_folder(tmp_path / name)
    data = ImageFolderData(data_dir=tmp_path, batch_size=2, num_workers=0, image_size=24)
    assert data.num_classes == 2
    check_shapes(data, 3, 24, 24)
    assert tuple(len(part) for part in data.splits) == sizes  # type: ignore[arg-type]


def test_image_folder_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Point data_dir at the folder that holds train/"):
        ImageFolderData(data_dir=tmp_path)
    image_folder(tmp_path / "train")
    image_folder(tmp_path / "test", classes="ac")
    with pytest.raises(ValueError, match=r"same class folders as train/.*: b, c"):
        ImageFolderData(data_dir=tmp_path).setup()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DigitsData(batch_size=0), "batch_size must be at least 1, but received 0"),
        (lambda: DigitsData(num_workers=-1), "num_workers must be at least 0, but received -1"),
        (lambda: DigitsData(seed=-1), "seed must be at least 0, but received -1"),
        (lambda: DigitsData(image_size=4), "image_size must be at least 8, but received 4"),
        (lambda: DigitsData(channels=2), "channels must be 1 .* or 3 .* received 2"),
        (lambda: FashionMNISTData(channels=4), "channels must be 1 .* or 3 .* received 4"),
        (lambda: SyntheticData(num_classes=1), "num_classes must be at least 2, but received 1"),
        (lambda: ImageFolderData(data_dir=".", val_fraction=0.5), "val_fraction .* received 0.5"),
    ],
)
def test_bad_arguments_fail_at_once(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
