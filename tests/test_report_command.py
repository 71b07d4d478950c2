"""The report of a run of `qat-train`, and `qat-report`, which makes it again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hydra import compose

from qat_lightning.cli import report as command
from qat_lightning.cli.train import train
from qat_lightning.report.content import Report

pytestmark = pytest.mark.usefixtures("hydra")

SHORT = ["trainer.max_epochs=2", "trainer.enable_progress_bar=false", "quantization.freeze_observers_at=1"]


@pytest.fixture(scope="module")
def finished(hydra: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("run")
    train(compose("train", overrides=[f"output_dir={folder}", "export=all", *SHORT]))
    return folder


@pytest.fixture
def moved(finished: Path, tmp_path: Path) -> Path:
    """The run, elsewhere."""
    return shutil.copytree(finished, tmp_path / "moved")


def content(folder: Path) -> Report:
    return Report.from_json((folder / "report.json").read_text())


def test_a_run_of_the_command_reports_the_test_split(finished: Path) -> None:
    metrics, found = json.loads((finished / "metrics.json").read_text()), content(finished)
    assert found.title == "ImageClassifier DigitsCNN"
    assert {score.split for score in found.scores} == {"test"}
    accuracies = {(s.network, s.runtime): s.metrics["test/accuracy"] for s in found.scores}
    assert accuracies["fake-quant", "PyTorch"] == metrics["fake_quant_accuracy"]
    assert accuracies["int8", "OpenVINO"] == metrics["exported"][str(finished / "int8.xml")]["accuracy"]
    assert ("float", "PyTorch") not in accuracies  # it began with no weights
    assert len(found.epochs) == 2
    assert [mark.what for mark in found.marks] == ["observers frozen"]
    assert "ImageClassifier DigitsCNN" in (finished / "report.html").read_text()


def test_what_is_measured_again_is_what_was_measured(moved: Path) -> None:
    before = content(moved)
    (moved / "report.json").unlink()
    (moved / "report.html").unlink()
    command.main([str(moved)])
    after = content(moved)
    assert after.scores == before.scores
    assert after.epochs == before.epochs
    assert after.marks == before.marks
    assert [network.name for network in after.networks] == ["network"]
    assert after.networks == before.networks  # the same batch of the same checkpoint
    assert {(s.runtime, s.batch, s.name) for s in after.speeds} == {
        (s.runtime, s.batch, s.name) for s in before.speeds
    }


@pytest.mark.slow
def test_a_damaged_report_is_told_and_measured_anew_on_request(
    moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (moved / "report.json").write_text("{")
    with pytest.raises(SystemExit, match="not a report of qat-lightning"):
        command.main([str(moved)])
    command.main([str(moved), "--measure"])
    assert "test/accuracy" in capsys.readouterr().out
    assert content(moved).networks


def test_a_float_run_has_no_report(tmp_path: Path) -> None:
    train(compose("train", overrides=[f"output_dir={tmp_path}", "backend=float", *SHORT[:2]]))
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(SystemExit, match="is a float run"):
        command.main([str(tmp_path)])


@pytest.mark.slow
def test_what_the_training_bought_is_told(tmp_path: Path) -> None:
    train(compose("train", overrides=[f"output_dir={tmp_path}/float", "experiment=digits_float"]))
    options = ["experiment=digits_demo", f"weights={tmp_path}/float/float.pt", *SHORT]
    metrics = train(compose("train", overrides=[f"output_dir={tmp_path}/int8", *options]))
    assert abs(metrics["post_training_accuracy"] - metrics["float_accuracy"]) < 0.02
    found = content(tmp_path / "int8").scores
    names = ["float", "int8 without training", "fake-quant", "int8"]
    assert [score.network for score in found] == names
    assert found[1].metrics["test/accuracy"] == metrics["post_training_accuracy"]
    options += ["post_training=false", "report=false"]
    metrics = train(compose("train", overrides=[f"output_dir={tmp_path}/without", *options]))
    assert metrics["post_training_accuracy"] is None
