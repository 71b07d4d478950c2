"""The images of the two tasks: a line with one string, and a page with several strings to find."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate
from torchvision.ops import box_iou

from examples.ocr.strings import Dice, Pen, paper, put, tone

LINE = (32, 128)
PAGE = (96, 128)
BATCH = 32


class Drawn(Dataset[tuple[Tensor, Any]]):
    """A million images; each is drawn when it is read, and is always the same.

    Args:
        split: `"train"`, `"val"` or `"test"`, which share no digit.
    """

    def __init__(self, split: str) -> None:
        self.split, self.pen = split, Pen(split)

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.draw(Dice(f"{self.split} {index}"))

    def draw(self, dice: Dice) -> tuple[Tensor, Any]:
        """Returns an image and its target."""
        raise NotImplementedError


class Lines(Drawn):
    """Images of 1x32x128, and the digits of the string in each."""

    def draw(self, dice: Dice) -> tuple[Tensor, str]:
        height, width = LINE
        ink, text = self.pen.write(dice, dice.uniform(16, 25), width - 4)
        page = torch.zeros(LINE)
        put(ink, page, dice.randint(0, height - len(ink)), dice.randint(0, width - ink.shape[1]))
        return (paper(dice, *LINE) + tone(dice) * page)[None], text


class Pages(Drawn):
    """Images of 1x96x128, and the boxes (x1, y1, x2, y2) of the one to four strings in each."""

    def draw(self, dice: Dice) -> tuple[Tensor, Tensor]:
        image, boxes = paper(dice, *PAGE), torch.empty(0, 4)
        for _ in range(dice.randint(1, 4)):
            ink, _ = self.pen.write(dice, dice.uniform(10, 24), PAGE[1] - 4)
            (height, width), page = ink.shape, torch.zeros(PAGE)
            top, left = dice.randint(0, PAGE[0] - height), dice.randint(0, PAGE[1] - width)
            box = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float)
            margin = torch.tensor([-4.0, -4.0, 4.0, 4.0])
            if not box_iou(box + margin, boxes).any():  # there is room
                put(ink, page, top, left)
                image, boxes = image + tone(dice) * page, torch.cat([boxes, box])
        return image[None], boxes


def batch_of(samples: list[tuple[Tensor, Any]]) -> tuple[Tensor, list[Any]]:
    """Collates images into one tensor and targets into a list."""
    images, targets = zip(*samples, strict=True)
    return default_collate(list(images)), list(targets)


def training_data(data: Drawn, count: int, seed: int) -> DataLoader[Any]:
    """Samples `count` new images in every epoch, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(data, replacement=True, num_samples=count, generator=generator)
    return DataLoader(data, BATCH, sampler=sampler, collate_fn=batch_of)


def fixed_data(data: Drawn, count: int) -> DataLoader[Any]:
    """Returns the first `count` images, drawn once."""
    images: Any = [data[index] for index in range(count)]
    return DataLoader(images, 4 * BATCH, collate_fn=batch_of)
