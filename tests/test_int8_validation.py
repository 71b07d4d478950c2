"""Int8 is validated while it is trained, and training does not notice."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torchmetrics
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from qat_lightning import QuantizationAwareTraining
from qat_lightning.analysis.scoring import lone_trainer
from tests.networks import CLASSES, Residual, same_state
from tests.runs import TinyModule, trainer


class Scored(TinyModule):
    """Logs a metric object, and a mean."""

    def __init__(self) -> None:
        super().__init__(Residual())
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.accuracy(self(batch[0]), batch[1])
        self.log("val/accuracy", self.accuracy)


class Noted(pl.Callback):
    """What was logged after each epoch."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(folder: Path, *callbacks: pl.Callback, every: int | None, epochs: int = 4) -> tuple[Any, Noted]:
    pl.seed_everything(3, verbose=False)
    noted, module = Noted(), Scored()
    qat = QuantizationAwareTraining(int8_val_every_n_epochs=every, backend="onednn")
    trainer(folder, qat, *callbacks, noted, max_epochs=epochs).fit(module)
    return module, noted


def test_int8_is_scored_by_the_users_own_metrics(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_int8/accuracy", mode="max", every_n_epochs=2)
    _, noted = fit(tmp_path, checkpoint, every=2)
    scored = ["val_int8/accuracy" in metrics for metrics in noted.metrics]
    assert scored == [False, True, True, True]  # Lightning keeps the last value of a metric
    for metrics in (noted.metrics[1], noted.metrics[3]):
        gap = metrics["val/accuracy"] - metrics["val_int8/accuracy"]
        assert metrics["quantization_gap/accuracy"] == pytest.approx(gap, abs=1e-6)
        assert abs(metrics["quantization_gap/loss"]) < 0.05 < metrics["val_int8/loss"]
    assert checkpoint.best_model_score == max(m["val_int8/accuracy"] for m in noted.metrics[1:])


def test_early_stopping_may_watch_it(tmp_path: Path) -> None:
    stop = EarlyStopping("val_int8/accuracy", mode="max", patience=1, min_delta=2)
    _, noted = fit(tmp_path, stop, every=1)
    assert len(noted.metrics) == 2


def test_the_training_does_not_notice(tmp_path: Path) -> None:
    with_it, _ = fit(tmp_path / "with", every=1, epochs=2)
    without, _ = fit(tmp_path / "without", every=None, epochs=2)
    assert same_state(with_it, without) == []


def test_every_no_epochs_is_refused() -> None:
    with pytest.raises(ValueError, match="must be None or at least 1, but received 0"):
        QuantizationAwareTraining(int8_val_every_n_epochs=0)


def test_nobody_is_told_of_a_gpu_that_int8_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="GPU available but not used"):
            pl.Trainer(accelerator="cpu", **options)
        lone_trainer()
