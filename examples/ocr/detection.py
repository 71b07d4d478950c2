"""Finds the strings on a page: a map of where they are, and from there the distances to their sides."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from examples.ocr.boxes import HMean, decode, targets, to_boxes
from examples.ocr.layers import conv, falling_rate


class Finder(nn.Module):
    """Maps Nx1xHxW to score logits and the logarithms of four distances, for cells of 4x4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.quarter = nn.Sequential(conv(1, 16, stride=2), conv(16, 24, stride=2))
        self.eighth = conv(24, 32, stride=2)
        self.sixteenth = nn.Sequential(conv(32, 48, stride=2), conv(48, 48), conv(48, 48))
        self.to_eighth = conv(32 + 48, 32)
        self.to_quarter = conv(24 + 32, 32)
        # Two layers, since each output has a range of its own to be rounded in.
        self.scores, self.distances = nn.Conv2d(32, 1, 1), nn.Conv2d(32, 4, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        quarter = self.quarter(images)
        eighth = self.eighth(quarter)
        features = self.to_eighth(torch.cat([eighth, twice(self.sixteenth(eighth))], 1))
        features = self.to_quarter(torch.cat([quarter, twice(features)], 1))
        return self.scores(features).squeeze(1), self.distances(features)


def twice(features: Tensor) -> Tensor:
    """Doubles the size of a feature map."""
    return F.interpolate(features, scale_factor=2.0, mode="nearest")


class Detection(LightningModule):
    """Trains a finder, and tests how well its boxes match the true ones.

    Args:
        lr: Learning rate that the training begins with.
    """

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.model = Finder()
        self.hmean = HMean()

    def training_step(self, batch: tuple[Tensor, list[Tensor]], batch_idx: int) -> Tensor:
        images, boxes = batch
        scores, distances = self.model(images)
        positive, wanted = targets(scores, boxes)
        inside = positive.bool()
        found = to_boxes(scores, distances)[inside]
        presence = sigmoid_focal_loss(scores, positive, reduction="sum") / inside.sum().clamp(min=1)
        return presence + generalized_box_iou_loss(found, wanted[inside], reduction="mean")

    def validation_step(self, batch: tuple[Tensor, list[Tensor]], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch[0]))

    def test_step(self, batch: tuple[Tensor, list[Tensor]], batch_idx: int) -> None:
        images, boxes = batch
        self.hmean.update(decode(*self.model(images)), boxes)
        self.log("hmean", self.hmean, batch_size=len(images))

    def configure_optimizers(self) -> Any:
        return falling_rate(self)
