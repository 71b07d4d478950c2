"""Boxes of strings: the targets of a network, its predictions, and their score."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchvision.ops import box_iou, nms

STRIDE = 4
"""The distance in pixels between cells of a score map."""
CENTRE = 0.5
"""The share of a box's width and height in which cells are positive."""


def centres(scores: Tensor) -> Tensor:
    """Returns the pixel (x, y) at the centre of each cell of a score map, as HxWx2."""
    height, width = scores.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (torch.stack([x, y], -1) + 0.5) * STRIDE


def to_boxes(scores: Tensor, distances: Tensor) -> Tensor:
    """For each cell the box, as NxHxWx4, whose sides are so far from it: left, top, right, bottom.

    Args:
        scores: NxHxW.
        distances: Their logarithms in cells, as Nx4xHxW.
    """
    sides = distances.permute(0, 2, 3, 1).clamp(-5, 5).exp() * STRIDE
    points = centres(scores)
    return torch.cat([points - sides[..., :2], points + sides[..., 2:]], -1)


def targets(scores: Tensor, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns whether each cell lies in the centre of a box, as NxHxW, and that box, as NxHxWx4."""
    positive, wanted = torch.zeros(scores.shape), torch.zeros(*scores.shape, 4)
    points = centres(scores)
    for index, of_image in enumerate(boxes):
        for box in of_image:
            middle, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
            inside = ((points - middle).abs() <= CENTRE / 2 * size).all(-1)
            positive[index][inside], wanted[index][inside] = 1, box
    return positive, wanted


def decode(scores: Tensor, distances: Tensor) -> list[Tensor]:
    """Returns the boxes in each image.

    Args:
        scores: Logits, as NxHxW.
        distances: As :func:`to_boxes` takes them.
    """
    found = []
    for score, boxes in zip(scores, to_boxes(scores, distances), strict=True):
        sure = score > 0
        found.append(boxes[sure][nms(boxes[sure], score[sure], 0.2)])
    return found


def matches(found: Tensor, true: Tensor, least: float = 0.5) -> int:
    """Counts pairs of a found and a true box with an IoU of `least` or more; the best pairs match first."""
    overlap, count = box_iou(found, true), 0
    while overlap.numel() and overlap.max() >= least:
        row, column = divmod(int(overlap.argmax()), overlap.shape[1])
        overlap[row], overlap[:, column] = 0, 0
        count += 1
    return count


class HMean(Metric):
    """The F1 score at an IoU of 0.5, over all boxes."""

    matched: Tensor
    boxes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("matched", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("boxes", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, found: list[Tensor], true: list[Tensor]) -> None:
        """Adds the boxes of some images."""
        for one, other in zip(found, true, strict=True):
            self.matched += matches(one, other)
            self.boxes += len(one) + len(other)

    def compute(self) -> Tensor:
        """Returns the F1 score: twice the pairs, divided by the number of boxes."""
        return 2 * self.matched / self.boxes.clamp(min=1)
