"""`qat-train weights=… accuracy_target=…`: searched once, and not again where the run goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose
from torch import Tensor

from qat_lightning import TargetError
from qat_lightning.cli.train import train
from qat_lightning.quantize.recipe import recipes_in

SHORT = ["trainer.max_epochs=1", "report=false", "resume=auto"]

pytestmark = [
    pytest.mark.usefixtures("hydra"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    return train(compose("train", overrides=[f"output_dir={folder}", *SHORT, *overrides]))


@pytest.fixture(scope="module")
def weights(hydra: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a trained network in which int8 ruins `grow.0`."""
    folder = tmp_path_factory.mktemp("float")
    run(folder, "experiment=digits_float", "trainer.max_epochs=3")
    path = folder / "float.pt"
    state: dict[str, Tensor] = torch.load(path, weights_only=True)
    state["stem.1.weight"][0], state["stem.1.bias"][0] = 0, -1
    state["grow.0.weight"][:, 0] = 300
    torch.save(state, path)
    return path


def test_the_command_keeps_what_the_target_takes(
    tmp_path: Path, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = [
        "experiment=digits_demo",
        f"weights={weights}",
        "accuracy_target=half_point",
        "quantization.accuracy_target.max_drop=2",
    ]
    with caplog.at_level(logging.INFO):
        metrics = run(tmp_path, *arguments)
    assert "with grow.0 float it is" in caplog.text
    assert metrics["float_accuracy"] > 0.8
    assert metrics["post_training_accuracy"] < metrics["float_accuracy"] - 0.2
    assert metrics["int8_accuracy"] > metrics["float_accuracy"] - 0.05
    (tmp_path / "metrics.json").unlink()  # interrupted before the results were written
    caplog.clear()
    with caplog.at_level(logging.INFO):
        again = run(tmp_path, *arguments)
    assert "Kept float by the run that is resumed: grow.0" in caplog.text
    assert "Target of at most" not in caplog.text
    assert again["int8_accuracy"] == metrics["int8_accuracy"]
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert recipes_in(state)["network"].keep_float == ("grow.0",)


def test_without_weights_there_is_nothing_to_lose(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"not trained.*weights=…"):
        run(tmp_path, "experiment=digits_demo", "accuracy_target=half_point")
