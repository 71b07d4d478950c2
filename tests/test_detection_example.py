"""The example of object detection: its scenes, what its loss takes, and a tiny run of the whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from tests.processes import run_all

pytest.importorskip("pycocotools")
pytest.importorskip("ultralytics")

from examples.detection.detector import as_ultralytics, decode
from examples.detection.scenes import SIZE, SceneData, Scenes

FORMS = ("float", "int8, not trained", "fake-quant", "int8", "int8 in ONNX Runtime", "int8 in OpenVINO")


def test_boxes_of_a_scene_lie_in_it_apart_from_each_other() -> None:
    scenes: list[Any] = [Scenes("train")[index] for index in range(30)]
    for image, target in scenes:
        boxes = target["boxes"]
        assert image.shape == (1, SIZE, SIZE)
        assert len(boxes) == len(target["labels"]) >= 1
        assert bool(((boxes >= 0) & (boxes <= SIZE)).all())
        assert (torchvision.ops.box_iou(boxes, boxes) - torch.eye(len(boxes))).abs().max() < 1e-6
    assert {label for _, target in scenes for label in target["labels"].tolist()} == set(range(10))


def test_the_loss_takes_the_boxes_of_a_batch_as_shares_of_the_image() -> None:
    one = {"boxes": torch.tensor([[0.0, 32.0, 64.0, 128.0]]), "labels": torch.tensor([3])}
    two = {"boxes": torch.tensor([[0.0, 0, 16, 16], [64, 64, 128, 128]]), "labels": torch.tensor([7, 0])}
    found = as_ultralytics([one, two])
    assert found["batch_idx"].tolist() == [0, 1, 1]
    assert found["cls"].tolist() == [3, 7, 0]
    assert found["bboxes"].tolist() == [
        [0.25, 0.625, 0.5, 0.75],
        [0.0625, 0.0625, 0.125, 0.125],
        [0.75, 0.75, 0.5, 0.5],
    ]


def test_decoded_boxes_are_those_that_suppression_leaves() -> None:
    outputs = torch.zeros(2, 14, 5)
    outputs[0, :4, :3] = torch.tensor([[20.0, 20, 10, 10], [21, 20, 10, 10], [80, 80, 20, 40]]).T
    outputs[0, [4 + 3, 4 + 3, 4 + 9], [0, 1, 2]] = torch.tensor([0.5, 0.9, 0.7])
    found, nothing = decode(outputs)
    assert found["labels"].tolist() == [3, 9]
    assert found["boxes"].tolist() == [[16, 15, 26, 25], [70, 60, 90, 100]]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.7])
    assert len(nothing["boxes"]) == 0


def test_splits_share_no_scene() -> None:
    data = SceneData({"train": 4, "val": 4, "test": 4})
    batches = [
        next(iter(each())) for each in (data.train_dataloader, data.val_dataloader, data.test_dataloader)
    ]
    images = [image for images, _ in batches for image in images]
    assert len({image.numpy().tobytes() for image in images}) == 12


@pytest.mark.slow
def test_the_script_scores_every_form(tmp_path: Path) -> None:
    tiny = ["--epochs=2", "--tuning=1", "--scenes=64", "--tested=16", "--width=0.125"]
    command = ["-m", "examples.detection", *tiny, f"--folder={tmp_path}"]
    (said,) = run_all([(command, {})], tmp_path, timeout=600)
    assert "Warning" not in said
    for form in FORMS:
        assert re.search(rf"│ {re.escape(form)} +│ +[0-9.]+ +│ +[0-9.]+ +│", said), said
    assert all((tmp_path / f"int8.{suffix}").is_file() for suffix in ("pt", "onnx", "xml"))
