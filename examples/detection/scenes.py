"""Scenes of handwritten digits at random places and in random sizes, and the boxes around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.ops import box_iou

from examples.ocr.data import Drawn, batch_of
from examples.ocr.strings import Dice, cropped, paper, put, resized, tone

SIZE = 128
"""Width and height of a scene in pixels."""
Target = dict[str, Tensor]
"""The `boxes` (x1, y1, x2, y2) and `labels` of a scene, as torchmetrics takes them."""


class Scenes(Drawn):
    """Images of 1x128x128 with one to five digits, and their targets."""

    def draw(self, dice: Dice) -> tuple[Tensor, Target]:
        image, boxes, labels = paper(dice, SIZE, SIZE), torch.empty(0, 4), []
        for _ in range(dice.randint(1, 5)):
            index, height = dice.randrange(len(self.pen.labels)), dice.uniform(16, 56)
            ink = cropped(resized(self.pen.images[index], height, dice.uniform(0.7, 1.1) * height))
            top, left = (dice.randint(0, SIZE - side) for side in ink.shape)
            box = torch.tensor([[left, top, left + ink.shape[1], top + ink.shape[0]]], dtype=torch.float)
            if not box_iou(box, boxes).any():  # there is room
                page = torch.zeros(SIZE, SIZE)
                put(ink, page, top, left)
                image, boxes = image + tone(dice) * page, torch.cat([boxes, box])
                labels.append(self.pen.labels[index])
        return image[None], {"boxes": boxes, "labels": torch.tensor(labels)}


class SceneData(LightningDataModule):
    """Scenes to train, validate and test with, which share no digit. Each is drawn once.

    Args:
        counts: The number of scenes of each split: train, val and test.
        batch: Scenes in a step.
    """

    def __init__(self, counts: Mapping[str, int], batch: int = 16) -> None:
        super().__init__()
        self.scenes = {split: scenes(split, count) for split, count in counts.items()}
        self.batch = batch

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def _loader(self, split: str) -> DataLoader[Any]:
        data: Any = self.scenes[split]
        return DataLoader(data, self.batch, shuffle=split == "train", collate_fn=batch_of)


def scenes(split: str, count: int) -> list[tuple[Tensor, Target]]:
    """Returns the first scenes of a split."""
    data = Scenes(split)
    return [data[index] for index in range(count)]
