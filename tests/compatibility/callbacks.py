"""Lightning's callbacks that watch a run, save it or end it."""

from __future__ import annotations

import csv
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger

from qat_lightning import load_qat_checkpoint
from tests.compatibility.registry import Section
from tests.compatibility.runs import STEPS, Phases, callback, check, check_same, fit
from tests.networks import same_state
from tests.runs import TinyModule, trainer

row = Section("Callbacks")


class Scored(TinyModule):
    """Logs a score that is best in the second epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", (0.1, 0.9, 0.5, 0.4)[self.current_epoch])


class Exampled(TinyModule):
    """Has an example input far from its data."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.full((2, 3, 12, 12), 1000.0)


def best_two(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{epoch}", monitor="score", mode="max", save_top_k=2, **options)


@row(
    "ModelCheckpoint",
    'ModelCheckpoint(monitor="acc", mode="max", save_top_k=2)',
    "works; the best is converted",
)
def model_checkpoint_top_k(folder: Path) -> None:
    checkpoint = best_two(folder)
    run = fit(folder, checkpoint, module=Scored, qat=callback(convert="best"), max_epochs=4)
    assert {Path(path).name for path in checkpoint.best_k_models} == {"epoch=1.ckpt", "epoch=2.ckpt"}
    assert run.qat.converted_from == checkpoint.best_model_path == str(folder / "epoch=1.ckpt")
    check(run, load_qat_checkpoint(checkpoint.best_model_path, Scored()))


@row("ModelCheckpoint", "ModelCheckpoint(save_last=True)", "works")
def model_checkpoint_last(folder: Path) -> None:
    run = fit(folder, ModelCheckpoint(folder, save_last=True))
    last = load_qat_checkpoint(folder / "last.ckpt", TinyModule())
    assert same_state(last, run.module) == []
    check(run, last)


@row(
    "ModelCheckpoint",
    "ModelCheckpoint(save_weights_only=True)",
    "works; such a file is converted and evaluated; as in float training, a run cannot resume from it",
)
def model_checkpoint_weights_only(folder: Path) -> None:
    checkpoint = best_two(folder, save_weights_only=True)
    run = fit(folder, checkpoint, module=Scored, qat=callback(convert="best"), max_epochs=4)
    assert "optimizer_states" not in torch.load(checkpoint.best_model_path, weights_only=True)
    assert run.qat.converted_from == checkpoint.best_model_path
    with pytest.raises(KeyError, match="save_weights_only"):  # Lightning's own words
        trainer(folder, callback(), max_epochs=5).fit(Scored(), ckpt_path=checkpoint.best_model_path)
    check(run, load_qat_checkpoint(checkpoint.best_model_path, Scored()))


@row(
    "EarlyStopping",
    'EarlyStopping("score", mode="max", patience=1)',
    "works; the weights at the stop are converted; fractions refer to the requested length",
)
def early_stopping(folder: Path) -> None:
    phases = Phases()
    stopping = EarlyStopping("score", mode="max", patience=1)
    run = fit(folder, stopping, phases, module=Scored, max_epochs=4)
    assert stopping.stopped_epoch == 2
    assert [phase.observe for phase in phases.seen] == [True] * 2 * STEPS + [False] * STEPS
    check(run)


@row("LearningRateMonitor", 'LearningRateMonitor("step")', "works")
def learning_rate_monitor(folder: Path) -> None:
    class Decayed(TinyModule):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)]

    logger = CSVLogger(folder)
    run = fit(folder, LearningRateMonitor("step"), module=Decayed, logger=logger, log_every_n_steps=STEPS)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rates = [float(line["lr-SGD"]) for line in csv.DictReader(file) if line["lr-SGD"]]
    assert rates == pytest.approx([0.05, 0.005])
    check(run)


@row(
    "GradientAccumulationScheduler",
    "GradientAccumulationScheduler({1: 3})",
    "works; fractions refer to optimizer steps",
)
def gradient_accumulation_scheduler(folder: Path) -> None:
    phases = Phases()
    run = fit(folder, GradientAccumulationScheduler({0: 1, 2: 3}), phases, max_epochs=4)
    assert run.trainer.global_step == 2 * STEPS + 2 * STEPS // 3
    frozen_after = (2 * STEPS + 2 * STEPS // 3) // 2
    assert [phase.observe for phase in phases.seen] == [i < frozen_after for i in range(4 * STEPS)]
    check(run)


@row("Timer", "Timer(timedelta(hours=8))", "works; the weights at the stop are converted")
def timer(folder: Path) -> None:
    run = fit(folder, Timer(timedelta(microseconds=1), interval="step"))
    assert run.trainer.global_step == 1
    check(run)


@row("DeviceStatsMonitor", "DeviceStatsMonitor()", "works")
def device_stats_monitor(folder: Path) -> None:
    pytest.importorskip("psutil")
    logger = CSVLogger(folder)
    run = fit(folder, DeviceStatsMonitor(cpu_stats=True), logger=logger, log_every_n_steps=1)
    assert "DeviceStatsMonitor.on_train_batch_end" in (Path(logger.log_dir) / "metrics.csv").read_text()
    check(run)


@row(
    "ModelSummary",
    "ModelSummary(max_depth=2)",
    "works; it lists the prepared network, and its example input changes no range",
)
def model_summary(folder: Path) -> None:
    class Listing(ModelSummary):
        names: tuple[str, ...] = ()

        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            super().on_fit_start(trainer, pl_module)
            self.names = tuple(self._summary(trainer, pl_module).layer_names)

    summary = Listing(max_depth=2)
    run = fit(folder, summary, module=Exampled)
    assert "model.activation_post_process_0" in summary.names
    check_same(run, fit(folder, module=Exampled))
    check(run)


@row("RichModelSummary", "RichModelSummary()", "works, likewise")
def rich_model_summary(folder: Path) -> None:
    run = fit(folder, RichModelSummary(max_depth=2), module=Exampled)
    check_same(run, fit(folder, module=Exampled))
    check(run)


@row("RichProgressBar", "RichProgressBar()", "works")
def rich_progress_bar(folder: Path) -> None:
    bar = RichProgressBar()
    run = fit(folder, bar, enable_progress_bar=True)
    assert bar.total_train_batches == STEPS
    check_same(run, fit(folder))
    check(run)


@row("TQDMProgressBar", "TQDMProgressBar()", "works")
def tqdm_progress_bar(folder: Path) -> None:
    bar = TQDMProgressBar()
    run = fit(folder, bar, enable_progress_bar=True)
    assert bar.train_progress_bar.n == STEPS
    check_same(run, fit(folder))
    check(run)
