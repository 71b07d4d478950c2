"""The benchmark of accuracy: which images it trains on, and that nothing is computed twice."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy import __main__ as benchmark
from benchmarks.accuracy.tasks import Task, tasks
from qat_lightning.tasks.models import DigitsCNN
from tests.photographs import write_photographs


@pytest.fixture(autouse=True)
def lightning_speaks_again() -> Iterator[None]:
    """The benchmark silences it, which other tests listen to."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    return write_photographs(tmp_path / "images")


def test_a_share_of_the_photographs_is_another_task(photographs: Path) -> None:
    (whole,), (half,) = (tasks(photographs, ["resnet20"], every) for every in (1, 2))
    assert torch.equal(half.train[0], whole.train[0][::2])
    assert half.train[1].tolist() == [0] * 40 + [1] * 40
    assert torch.equal(half.test[0], whole.test[0])
    assert whole.key == "resnet20-160-30-5"
    assert half.key == "resnet20-80-30-5"


def test_batches_are_those_of_seed_and_epoch(photographs: Path) -> None:
    (task,) = tasks(photographs, ["resnet20"])
    task = task._replace(batch=4)
    first, again, other = (list(task.batches(seed, epoch)) for seed, epoch in ((0, 1), (0, 1), (1, 0)))
    assert len(first) == task.steps == 40
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


def test_methods_are_scored_once_and_compared_with_float(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(*_: Any) -> list[Task]:
        pixels = torch.randn(96, 1, 8, 8)
        labels = torch.arange(96) % 10
        both = (pixels[:64], labels[:64]), (pixels[64:], labels[64:])
        return [Task("digits", DigitsCNN, *both, 1, 1, 0.05, 16, False)]

    monkeypatch.setattr(benchmark, "tasks", short)
    methods = ["float", "post-training", "ours", "torch fx", "torchvision"]
    line = ["accuracy", "--cache", str(tmp_path), "--seeds", "0", "1", "--methods", *methods]
    monkeypatch.setattr(sys, "argv", line)
    benchmark.main()
    shown = capsys.readouterr().out
    for method in methods:
        assert method in shown
    (cached,) = tmp_path.glob("digits-64-1-1-1-ours-*.json")
    scores = json.loads(cached.read_text())
    assert scores.keys() == {"fake-quant", "int8", "int8 in ONNX Runtime"}
    cached.write_text(json.dumps({**scores, "int8": 1000.0}))
    benchmark.main()
    assert (
        f"{(1000 + json.loads(next(tmp_path.glob('digits-64-1-1-0-ours-*')).read_text())['int8']) / 2:.2f}"
        in (capsys.readouterr().out)
    )
