"""The example on photographs runs on a small folder of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from examples.cifar10.data import Photographs
from tests.photographs import write_photographs
from tests.processes import run_all

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_photographs(tmp_path / "images")


def test_validation_images_are_not_trained_on(folder: Path) -> None:
    data = Photographs(folder, workers=0)
    train, val = set(data.train.indices), set(data.val.indices)
    assert not train & val
    assert len(train | val) == 160
    targets = data.train.dataset.targets  # type: ignore[attr-defined]
    assert [sum(targets[i] == label for i in val) for label in (0, 1)] == [8, 8]


def test_the_script_prints_every_form(folder: Path, tmp_path: Path) -> None:
    arguments = ["--epochs", "1", "--qat-epochs", "1", "--lr", "0.05", "--batch", "16"]
    command = ["-m", "examples.cifar10.train", str(folder), *arguments, "--output", str(tmp_path)]
    (said,) = run_all([(command, {})], tmp_path)
    assert "Warning" not in said
    assert (tmp_path / "resnet20" / "int8.onnx").is_file()
    scores = {}
    for name in ("float", "int8 without training", "int8", "int8.pt", "int8.onnx"):
        score = re.search(rf"^│ {re.escape(name)} +│ +([0-9.]+)", said, flags=re.MULTILINE)
        assert score, said
        scores[name] = float(score[1])
    assert scores["int8"] == scores["int8.pt"] == pytest.approx(scores["int8.onnx"], abs=5)  # of 40 images
    assert scores["int8"] >= 50
