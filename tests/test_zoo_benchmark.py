"""The benchmark of many networks: its rows, its page, and one run of it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.zoo_models import entries
from benchmarks.zoo_report import COLUMNS, report
from qat_lightning.base.nested import tensors_in

ROOT = Path(__file__).parents[1]
OURS = {"ok": True, "share": 0.5, "sqnr": 20.0, "floor": 30.0, "seconds": 2.0}


def rows(page: str) -> list[str]:
    return re.findall(r"^\| ([^|]+) \|", page.partition(COLUMNS)[2], re.MULTILINE)


def test_the_page_lists_every_network_once() -> None:
    names = [entry.name for entry in entries()]
    assert len(set(names)) == len(names)
    assert rows((ROOT / "docs/zoo.md").read_text()) == names


def test_every_network_is_called_with_two_samples() -> None:
    torch.manual_seed(0)
    for entry in entries():
        first = tensors_in(tuple(entry.call()))[0]
        assert first.shape[0] == 2 or entry.part, entry.name
        assert str(first.shape[-1]) == entry.size.removesuffix(" tokens"), entry.name


def test_the_page_counts_each_package_and_names_what_fails() -> None:
    failed = {"ok": False, "error": "ValueError", "reason": "no layers at forward:3"}
    figures = {
        "alexnet": {"ours": OURS, "torch": {"ok": True, "sqnr": 20.0}},
        "transformers/Bert": {"ours": failed, "torch": {"ok": False, "error": "TypeError", "reason": "-"}},
        "ultralytics/yolo11n": {
            "ours": {**OURS, "sqnr": math.inf, "untraceable": ["model.23 (head.py:7: if x:)"]}
        },
    }
    page = report(figures)
    assert "| torchvision | 1 of 1 | 0 | 1 of 1 | 1 of 1 |" in page
    assert "| transformers | 0 of 1 | 0 | 0 of 1 | 0 of 1 |" in page
    assert "| ultralytics | 1 of 1 | 1 | 1 of 1 | 0 of 0 |" in page
    assert "- transformers/Bert: no layers at forward:3\n" in page
    assert "- ultralytics/yolo11n: model.23 (head.py:7: if x:)\n" in page
    assert rows(page) == list(figures)


@pytest.mark.slow
def test_frozen_backbones_are_int8_throughout_and_outputs_may_be_nested(tmp_path: Path) -> None:
    figures = tmp_path / "zoo.json"
    names = ["ssdlite320_mobilenet_v3_large.backbone", "fcos_resnet50_fpn.backbone (frozen)"]
    command = [sys.executable, "-m", "benchmarks.zoo", *names, "--json", str(figures)]
    subprocess.run([*command, "--output", str(tmp_path / "zoo.md")], cwd=ROOT, check=True)
    found = json.loads(figures.read_text())
    assert set(found) == set(names)
    for name, row in found.items():
        assert row["ours"]["ok"], (name, row["ours"])
        assert row["ours"]["captured"]
        assert row["ours"]["share"] == 1
        assert row["ours"]["sqnr"] > row["ours"]["floor"] - 6
        assert row["torch"]["ok"] or row["torch"]["error"]


@pytest.mark.slow
def test_a_network_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    figures = tmp_path / "zoo.json"
    command = [sys.executable, "-m", "benchmarks.zoo", "resnet18", "--ways", "ours", "--timeout", "1"]
    command += ["--json", str(figures), "--output", str(tmp_path / "zoo.md")]
    subprocess.run(command, cwd=ROOT, check=True)
    assert json.loads(figures.read_text())["resnet18"]["ours"]["error"] == "timeout"
