"""A YOLO as a LightningModule, with the loss of ultralytics and the metric of torchmetrics."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_convert
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel, yaml_model_load
from ultralytics.utils.loss import v8DetectionLoss
from ultralytics.utils.nms import non_max_suppression

from examples.detection.scenes import SIZE, Target


def yolo(width: float, classes: int = 10) -> DetectionModel:
    """Returns a YOLOv8 for grey images, with random weights.

    In training mode it returns raw boxes and scores, for the loss. In eval mode it returns decoded boxes
    above the probabilities of the classes, as N x (4 + classes) x cells.

    Args:
        width: Share of the channels; 0.25 is YOLOv8n.
        classes: Number of classes.
    """
    config = yaml_model_load("yolov8n.yaml")
    config |= {"nc": classes, "scales": {"n": [0.33, width, 1024]}}
    network: Any = DetectionModel(config, ch=1, verbose=False)
    network.args = get_cfg()  # the weights of the parts of the loss
    network.model[-1].export = True  # the raw outputs would be outputs of the files too
    return network


class Detector(LightningModule):
    """Trains a YOLO, without any code for quantization.

    Args:
        lr: Highest learning rate.
        width: Share of the network's channels.
    """

    def __init__(self, lr: float, width: float) -> None:
        super().__init__()
        self.lr = lr
        self.network = yolo(width)
        self.loss = v8DetectionLoss(self.network)
        self.mean_ap = MeanAveragePrecision()

    def training_step(self, batch: tuple[Tensor, list[Target]], batch_idx: int) -> Tensor:
        images, targets = batch
        parts, _ = self.loss(self.network(images), as_ultralytics(targets))
        return parts.sum() / len(images)

    def validation_step(self, batch: tuple[Tensor, list[Target]], batch_idx: int) -> None:
        images, targets = batch
        self.mean_ap.update(decode(self.network(images)), targets)

    def on_validation_epoch_end(self) -> None:
        found = self.mean_ap.compute()
        self.log_dict({"mAP": found["map"], "mAP50": found["map_50"]}, prog_bar=True)
        self.mean_ap.reset()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=1e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


def as_ultralytics(targets: list[Target]) -> dict[str, Tensor]:
    """Returns targets as the loss takes them: all boxes of a batch, with sizes as shares of the image's."""
    boxes = torch.cat([each["boxes"] for each in targets])
    owners = torch.repeat_interleave(torch.tensor([len(each["boxes"]) for each in targets]))
    return {
        "batch_idx": owners.float(),
        "cls": torch.cat([each["labels"] for each in targets]).float(),
        "bboxes": box_convert(boxes, "xyxy", "cxcywh") / SIZE,
    }


def decode(outputs: Tensor) -> list[Target]:
    """Returns the boxes that non-maximum suppression leaves in each image, as torchmetrics takes them."""
    found = non_max_suppression(outputs, conf_thres=0.01, iou_thres=0.6, max_det=100)
    return [{"boxes": each[:, :4], "scores": each[:, 4], "labels": each[:, 5].long()} for each in found]
