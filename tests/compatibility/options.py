"""Arguments of the Trainer: how long, how often, how much."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from tests.compatibility.registry import Section
from tests.compatibility.runs import STEPS, Phases, Still, callback, check, check_same, fit
from tests.runs import TinyModule, loader

row = Section("Arguments of the Trainer")


class Gradients(pl.Callback):
    """Remembers the largest norm and the largest value of the gradients that reach the optimizer."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.values: list[float] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(float(torch.cat(gradients).norm()))
            self.values.append(float(torch.cat(gradients).abs().max()))


class Counted(TinyModule):
    """Counts what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"train": 0, "val": 0, "test": 0, "loaders": 0, "sanity": 0}
        self.validated_at: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.counts["train"] += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.counts["sanity" if self.trainer.sanity_checking else "val"] += 1
        super().validation_step(batch, batch_idx)

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated_at.append(self.trainer.global_step)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.counts["test"] += 1
        super().test_step(batch, batch_idx)

    def train_dataloader(self) -> DataLoader[Any]:
        self.counts["loaders"] += 1
        return super().train_dataloader()


@row("gradient_clip_val", 'Trainer(gradient_clip_val=1.0, gradient_clip_algorithm="norm")', "works")
def gradient_clip_by_norm(folder: Path) -> None:
    free, clipped = Gradients(), Gradients()
    fit(folder, free)
    run = fit(folder, clipped, gradient_clip_val=0.1)
    assert max(free.norms) > 0.2
    assert max(clipped.norms) <= 0.1001
    check(run, decibels=36)  # hardly trained: a step of its outputs is a twentieth of their spread


@row("gradient_clip_val", 'Trainer(gradient_clip_val=0.5, gradient_clip_algorithm="value")', "works")
def gradient_clip_by_value(folder: Path) -> None:
    clipped = Gradients()
    run = fit(folder, clipped, gradient_clip_val=0.01, gradient_clip_algorithm="value")
    assert max(clipped.values) == pytest.approx(0.01)
    check(run)


@row(
    "accumulate_grad_batches",
    "Trainer(accumulate_grad_batches=3)",
    "works; observers see every batch, and fractions refer to optimizer steps",
)
def accumulate_grad_batches(folder: Path) -> None:
    phases = Phases()
    run = fit(folder, phases, accumulate_grad_batches=3, max_epochs=4)
    assert run.trainer.global_step == 8
    assert [phase.observe for phase in phases.seen] == [True] * 12 + [False] * 12
    check(run)


@row("overfit_batches", "Trainer(overfit_batches=2)", "works")
def overfit_batches(folder: Path) -> None:
    def fixed() -> DataLoader[Any]:
        return loader()

    module = Counted()
    module.train_dataloader = module.val_dataloader = fixed  # type: ignore[method-assign]
    run = fit(folder, module=module, overfit_batches=2, max_epochs=12)
    assert (module.counts["train"], module.counts["val"]) == (24, 24)
    assert run.trainer.callback_metrics["val_loss"] < 0.7
    check(run)


@row(
    "limit_train_batches, limit_val_batches, limit_test_batches",
    "Trainer(limit_train_batches=0.5, limit_val_batches=1, limit_test_batches=2)",
    "works; fractions refer to the limited run",
)
def limit_batches(folder: Path) -> None:
    module, phases = Counted(), Phases()
    limits: dict[str, Any] = {"limit_train_batches": 0.5, "limit_val_batches": 1, "limit_test_batches": 2}
    run = fit(folder, phases, module=module, max_epochs=4, **limits)
    run.trainer.test(run.module, verbose=False)
    assert (module.counts["train"], module.counts["val"], module.counts["test"]) == (12, 4, 2)
    assert [phase.observe for phase in phases.seen] == [True] * 6 + [False] * 6
    check(run)


@row("val_check_interval", "Trainer(val_check_interval=100)", "works; no validation changes a range")
def val_check_interval_in_batches(folder: Path) -> None:
    module, still = Counted(), Still()
    run = fit(folder, before=(still,), module=module, val_check_interval=4, check_val_every_n_epoch=None)
    assert module.validated_at == [4, 8, 12]
    assert still.validations == 3
    check(run)


@row("val_check_interval", "Trainer(val_check_interval=0.25)", "works, likewise")
def val_check_interval_in_fractions(folder: Path) -> None:
    module, still = Counted(), Still()
    run = fit(folder, before=(still,), module=module, val_check_interval=0.5)
    assert module.validated_at == [3, 6, 9, 12]
    assert still.validations == 4
    check(run)


@row("check_val_every_n_epoch", "Trainer(check_val_every_n_epoch=2)", "works")
def check_val_every_n_epoch(folder: Path) -> None:
    module = Counted()
    run = fit(folder, module=module, check_val_every_n_epoch=2, max_epochs=4)
    assert module.validated_at == [2 * STEPS, 4 * STEPS]
    check(run)


@row(
    "num_sanity_val_steps",
    "Trainer(num_sanity_val_steps=0)",
    "works; the run is the same with and without sanity checks",
)
def num_sanity_val_steps(folder: Path) -> None:
    module = Counted()
    run = fit(folder, module=module, num_sanity_val_steps=0)
    assert module.counts["sanity"] == 0
    check_same(run, fit(folder, num_sanity_val_steps=-1))
    check(run)


@row("reload_dataloaders_every_n_epochs", "Trainer(reload_dataloaders_every_n_epochs=1)", "works")
def reload_dataloaders(folder: Path) -> None:
    module, phases = Counted(), Phases()
    run = fit(folder, phases, module=module, reload_dataloaders_every_n_epochs=1, max_epochs=4)
    assert module.counts["loaders"] == 4
    assert [phase.observe for phase in phases.seen] == [True] * 2 * STEPS + [False] * 2 * STEPS
    check(run)


@row("max_steps", "Trainer(max_epochs=-1, max_steps=1000)", "works; fractions refer to the steps")
def max_steps(folder: Path) -> None:
    phases = Phases()
    qat = callback(freeze_bn_at=0.75)
    run = fit(folder, phases, qat=qat, max_epochs=-1, max_steps=16)
    assert run.trainer.global_step == 16
    assert [phase.observe for phase in phases.seen] == [True] * 8 + [False] * 8
    assert [phase.freeze_bn for phase in phases.seen] == [False] * 12 + [True] * 4
    check(run)


@row(
    "max_time",
    'Trainer(max_time="00:08:00:00", max_epochs=90)',
    "works; fractions refer to max_epochs or max_steps, even if the time limit ends the run earlier",
)
def max_time(folder: Path) -> None:
    at_once = callback(calibration_steps=0)  # it ends after a step
    run = fit(folder, qat=at_once, max_time={"microseconds": 1}, max_epochs=4)
    assert run.trainer.global_step < 4 * STEPS
    check(run)


@row(
    "max_time",
    "Trainer(max_epochs=-1, max_time=...)",
    "refused if a freeze is a fraction, as by default: the length of the run is unknown. Give the freeze as "
    "an epoch, or set max_steps",
)
def max_time_alone(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"needs a run of known length.*give the freeze as an epoch"):
        fit(folder, max_epochs=-1, max_time={"hours": 1})
    run = fit(folder, qat=callback(freeze_observers_at=1), max_epochs=-1, max_time={"seconds": 1})
    check(run)


@row("detect_anomaly", "Trainer(detect_anomaly=True)", "works")
def detect_anomaly(folder: Path) -> None:
    run = fit(folder, detect_anomaly=True)
    check_same(run, fit(folder))
    check(run)


@row("deterministic", "Trainer(deterministic=True)", "works; no operation of the callback is refused")
def deterministic(folder: Path) -> None:
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    try:
        run = fit(folder, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        check_same(run, fit(folder, deterministic=True))
    finally:
        torch.use_deterministic_algorithms(False)
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    check(run)


@row(
    "barebones",
    "Trainer(barebones=True)",
    "works; it leaves out logging and saving, but not the conversion",
)
def barebones(folder: Path) -> None:
    module = TinyModule()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    run = fit(
        folder,
        module=module,
        barebones=True,
        enable_checkpointing=None,
        logger=None,
        enable_progress_bar=None,
        enable_model_summary=None,
    )
    assert run.qat.int8_path == folder / "int8.pt"
    assert run.qat.int8_path.is_file()
    check_same(run, fit(folder))
    check(run)


@row("fast_dev_run", "Trainer(fast_dev_run=True)", "works; it converts, and writes nothing")
def fast_dev_run(folder: Path) -> None:
    run = fit(folder, fast_dev_run=True)
    assert run.trainer.global_step == 1
    assert list(folder.iterdir()) == []
    check(run)


@row("inference_mode", "Trainer(inference_mode=False)", "works")
def inference_mode(folder: Path) -> None:
    run = fit(folder, inference_mode=False)
    check_same(run, fit(folder))
    check(run)


@row("profiler", 'Trainer(profiler="simple")', "works")
def profiler(folder: Path) -> None:
    run = fit(folder, profiler="simple")
    assert "QuantizationAwareTraining.on_train_epoch_start" in vars(run.trainer)["profiler"].summary()
    check(run)
