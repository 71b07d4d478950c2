"""One command that trains float, and then for int8 from its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from omegaconf import OmegaConf

from qat_lightning.cli.train import train
from tests.processes import run_all

pytestmark = [pytest.mark.usefixtures("hydra"), pytest.mark.slow]

SHORT = [
    "experiment=float_then_qat",
    "trainer.max_epochs=1",
    "float_first.trainer.max_epochs=3",
    "trainer.enable_progress_bar=false",
    "quantization.freeze_observers_at=null",
    "report=false",
]


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    return train(compose("train", overrides=[f"output_dir={folder}", *SHORT, *overrides]))


def test_int8_starts_from_the_weights_of_the_float_run(tmp_path: Path) -> None:
    metrics = run(tmp_path, "resume=auto")
    before = json.loads((tmp_path / "float" / "metrics.json").read_text())
    assert metrics["float_path"] == before["float_path"] == str(tmp_path / "float" / "float.pt")
    assert metrics["float_accuracy"] == before["float_accuracy"]
    assert before["int8_accuracy"] is None
    assert metrics["post_training_accuracy"] is not None
    assert metrics["int8_accuracy"] > 0.5
    configured = OmegaConf.load(tmp_path / "float" / "config.yaml")
    assert (configured.trainer.max_epochs, configured.optimizer.lr) == (3, 0.1)
    # Started again, nothing is trained again.
    written = (tmp_path / "float" / "float.pt").stat().st_mtime_ns
    assert run(tmp_path, "resume=auto") == metrics
    assert (tmp_path / "float" / "float.pt").stat().st_mtime_ns == written


def test_weights_that_are_given_need_no_float_run(tmp_path: Path) -> None:
    run(tmp_path / "first")
    metrics = run(tmp_path / "second", f"weights={tmp_path}/first/float/float.pt")
    assert not (tmp_path / "second" / "float").exists()
    assert metrics["float_path"] == f"{tmp_path}/first/float/float.pt"


def test_a_float_run_that_fails_ends_the_command(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"The float run in .* failed with exit status 1"):
        run(tmp_path, "float_first.optimizer.lr=-1")
    assert not (tmp_path / "int8.pt").exists()


def test_processes_that_are_started_together_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun has started the processes of this one already"):
        run(tmp_path)


@pytest.mark.slow
def test_with_two_processes_of_lightning(tmp_path: Path) -> None:
    command = ["-m", "qat_lightning", "trainer=ddp_cpu", "hydra.run.dir=run", *SHORT]
    (printed,) = run_all([(command, {})], tmp_path)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["float_path"] == str(tmp_path / "run" / "float" / "float.pt")
    assert metrics["int8_accuracy"] > 0.5
    assert printed.count("int8 without training") == 1
