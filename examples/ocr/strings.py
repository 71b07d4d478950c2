"""Strings of real handwritten digits and their backgrounds, all drawn from a seed."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import masks_to_boxes

from qat_lightning.tasks.data.digits import load_digits
from qat_lightning.tasks.data.split import stratified_split

SPLITS = {"train": 0.75, "val": 0.05, "test": 0.2}
"""The share of scikit-learn's 1,797 digits that each split writes its strings with."""
LENGTHS = (3, 6)


class Dice(random.Random):
    """Random numbers, and tensors of them, from one seed."""

    def normal(self, *shape: int) -> Tensor:
        """Returns normally distributed numbers."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.getrandbits(63)))


class Pen:
    """Writes strings with the digits of one split.

    Args:
        split: One of :data:`SPLITS`.
    """

    def __init__(self, split: str) -> None:
        images, labels = load_digits()
        parts = stratified_split(labels.tolist(), [*SPLITS.values()])
        own = parts[[*SPLITS].index(split)]
        self.images, self.labels = images[own], labels[own].tolist()

    def write(self, dice: Dice, height: float, widest: int) -> tuple[Tensor, str]:
        """Returns the ink of a string, between 0 and 1 and cropped to it, and what it says.

        Args:
            dice: Decides on length, digits, spacing and jitter.
            height: Height of a digit, less where the string would be wider than `widest`.
            widest: Largest width of the string.
        """
        chosen = dice.choices(range(len(self.labels)), k=dice.randint(*LENGTHS))
        widths, spacing = [dice.uniform(0.6, 0.9) for _ in chosen], dice.uniform(0.05, 0.35)
        height = min(height, widest / (sum(widths) + spacing * len(widths) + 0.1))
        ink, left = torch.zeros(math.ceil(1.25 * height), widest), 0.0
        for index, width in zip(chosen, widths, strict=True):
            digit = resized(self.images[index], dice.uniform(0.85, 1) * height, width * height)
            put(digit, ink, dice.randint(0, len(ink) - len(digit)), int(left))
            left += (width + spacing) * height
        return cropped(ink), "".join(str(self.labels[index]) for index in chosen)


def resized(digit: Tensor, height: float, width: float) -> Tensor:
    """Resizes a digit of 1x8x8."""
    size = (round(height), round(width))
    return F.interpolate(digit[None], size, mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)


def put(ink: Tensor, paper: Tensor, top: int, left: int) -> None:
    """Writes `ink` onto `paper`, in place."""
    there = paper[top : top + ink.shape[0], left : left + ink.shape[1]]
    there.copy_(torch.maximum(there, ink))


def cropped(ink: Tensor) -> Tensor:
    """Crops `ink` to what is not empty."""
    left, top, right, bottom = masks_to_boxes(ink[None] > 0.2)[0].int().tolist()
    return ink[top : bottom + 1, left : right + 1]


def paper(dice: Dice, height: int, width: int) -> Tensor:
    """Returns a grey background: plain, a gradient, stripes or blobs, always with noise."""
    angle = dice.uniform(0, 2 * math.pi)
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    along = x * math.cos(angle) + y * math.sin(angle)
    pattern = {
        "plain": lambda: torch.zeros(height, width),
        "gradient": lambda: along,
        "stripes": lambda: torch.sin(along * dice.uniform(5, 30)),
        "blobs": lambda: F.interpolate(dice.normal(1, 1, 4, 8), (height, width), mode="bicubic")[0, 0],
    }[dice.choice(["plain", "gradient", "stripes", "blobs"])]()
    noise = dice.uniform(0, 0.06) * dice.normal(height, width)
    return dice.uniform(0.3, 0.7) + dice.uniform(0, 0.12) * pattern + noise


def tone(dice: Dice) -> float:
    """Returns how much brighter than its background a string is; negative if it is darker."""
    return dice.choice([-1, 1]) * dice.uniform(0.4, 0.7)
