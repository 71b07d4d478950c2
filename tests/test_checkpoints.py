"""Checkpoints that a run goes on from, and those of another kind, which say which function reads them."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from qat_lightning import (
    QuantizationAwareTraining,
    RecipeMismatchError,
    latest_checkpoint,
    load_qat_checkpoint,
)
from qat_lightning.base.backends import engine
from qat_lightning.quantize.recipe import refuse_prepared_states
from qat_lightning.run.requeue import RequeueBetweenSteps
from qat_lightning.tasks.data import ResumableLoader
from tests.runs import TinyModule, dataset, trainer
from tests.test_resume import Crash, CrashAt, Noisy, assert_equal, seed

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")


def checkpoint(path: Path, *callbacks: pl.Callback, module: pl.LightningModule | None = None) -> Path:
    saver = ModelCheckpoint(path.parent, filename=path.stem)
    trainer(path.parent, *callbacks, saver, max_epochs=1).fit(module or TinyModule())
    return path


@pytest.fixture(scope="module")
def qat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a QAT run."""
    return checkpoint(tmp_path_factory.mktemp("qat") / "qat.ckpt", QuantizationAwareTraining())


@pytest.fixture(scope="module")
def floating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a float run."""
    return checkpoint(tmp_path_factory.mktemp("float") / "float.ckpt")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


# Which one a run goes on from


def test_the_newest_is_found(tmp_path: Path, qat: Path) -> None:
    assert latest_checkpoint(tmp_path) is latest_checkpoint(tmp_path / "none") is None
    for age, name in enumerate(("b/last.ckpt", "a.ckpt", "c.ckpt")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(qat, tmp_path / name)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert latest_checkpoint(tmp_path) == str(tmp_path / "b/last.ckpt")


@pytest.mark.parametrize("length", [0, 10, 0.5, -30])
def test_a_checkpoint_half_written_is_passed_over(
    tmp_path: Path, qat: Path, length: float, said: pytest.LogCaptureFixture
) -> None:
    shutil.copy(qat, tmp_path / "old.ckpt")
    os.utime(tmp_path / "old.ckpt", (1000, 1000))
    content = qat.read_bytes()
    end = int(length * len(content)) if 0 < length < 1 else int(length)
    (tmp_path / "new.ckpt").write_bytes(content[:end])
    assert latest_checkpoint(tmp_path) == str(tmp_path / "old.ckpt")
    about = [message for message in said.messages if "Skipping" in message]
    assert about == [f"Skipping the checkpoint {tmp_path}/new.ckpt: it is damaged or incomplete"]


def test_files_that_are_no_checkpoint_of_a_run(
    tmp_path: Path, qat: Path, said: pytest.LogCaptureFixture
) -> None:
    content = torch.load(qat, weights_only=True)
    without = {
        key: value for key, value in content.items() if key not in ("optimizer_states", "lr_schedulers")
    }
    objects = {**content, "hyper_parameters": {"path": Sized()}}
    for name, what in {"weights": without, "state": content["state_dict"], "objects": objects}.items():
        torch.save(what, tmp_path / f"{name}.ckpt")
    (tmp_path / "dangling.ckpt").symlink_to(tmp_path / "gone.ckpt")
    assert latest_checkpoint(tmp_path) is None
    assert "objects.ckpt: it holds objects. weights_only=False would read them" in said.text
    assert "weights.ckpt: it holds only weights: optimizer_states, lr_schedulers are missing" in said.text
    assert "state.ckpt: it is not a Lightning checkpoint" in said.text
    assert latest_checkpoint(tmp_path, weights_only=False) == str(tmp_path / "objects.ckpt")


class Sized:
    """An object among hyperparameters."""


def test_a_checkpoint_in_the_middle_of_a_step_is_the_last_choice(tmp_path: Path) -> None:
    class Fails(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 8:
                raise Crash
            return super().training_step(batch, batch_idx)

    savers = [ModelCheckpoint(tmp_path / "ends"), OnExceptionCheckpoint(tmp_path / "exception")]
    with pytest.raises(Crash), pytest.warns(UserWarning, match="ckpt_path"):
        trainer(tmp_path, QuantizationAwareTraining(), *savers, max_epochs=2).fit(Fails())
    assert latest_checkpoint(tmp_path) == str(tmp_path / "ends" / "epoch=0-step=6.ckpt")
    assert latest_checkpoint(tmp_path / "exception") == str(tmp_path / "exception" / "on_exception.ckpt")


# Going on from it exactly


class Resumable(Noisy):
    """Its training data resumes in mid-epoch, and its validation draws random numbers."""

    def train_dataloader(self) -> Any:
        return ResumableLoader(dataset(), 8, seed=3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        torch.rand(())
        super().validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


@pytest.mark.parametrize("save_last", [True, "link"])
@pytest.mark.parametrize("crash", [6, 13])
def test_a_validation_that_was_due_is_done(tmp_path: Path, crash: int, save_last: Any) -> None:
    """The checkpoint is of the last batch of an epoch; the best epoch may be the one that it ends."""

    def fit(folder: Path, ckpt_path: str | None, *extra: pl.Callback) -> Any:
        seed()
        torch.manual_seed(5 if ckpt_path is None else 6)
        qat = QuantizationAwareTraining(output_dir=folder)
        best = ModelCheckpoint(folder / "best", monitor="val_loss")
        steps = ModelCheckpoint(folder / "steps", every_n_train_steps=3, save_last=save_last)
        module = Resumable()
        runner = trainer(folder, qat, best, steps, *extra, max_epochs=3, num_sanity_val_steps=0)
        runner.fit(module, ckpt_path=ckpt_path)
        return module, qat, best.best_model_score, runner.optimizers[0].param_groups[0]["lr"]

    one, first, score, rate = fit(tmp_path / "whole", None)
    with pytest.raises(Crash):
        fit(tmp_path / "crashed", None, CrashInValidation(crash))
    for late in (tmp_path / "crashed" / "best").glob("*.ckpt"):
        os.utime(late, (1000, 1000))
    found = latest_checkpoint(tmp_path / "crashed")
    assert found is not None
    other, second, again, same = fit(tmp_path / "crashed", found)
    assert (score, rate) == (again, same)
    assert_equal(one, other, first, second)


class CrashInValidation(CrashAt):
    """Raises in the first validation that is due at a step or later."""

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.step:
            raise Crash

    def on_train_batch_start(self, *_: Any) -> None:
        pass


def test_outside_of_slurm_no_signal_is_touched(tmp_path: Path) -> None:
    trainer(tmp_path, RequeueBetweenSteps(), max_epochs=1, enable_checkpointing=False).fit(TinyModule())


# Checkpoints of another kind


def evaluator(folder: Path) -> pl.Trainer:
    return trainer(folder, QuantizationAwareTraining(), enable_checkpointing=False)


def test_a_qat_checkpoint_for_a_float_run(qat: Path) -> None:
    module = TinyModule()
    refuse_prepared_states(module)
    with pytest.raises(
        RecipeMismatchError, match=r"'model' is prepared.*but here it is float.*load_qat_checkp"
    ):
        module.load_state_dict(torch.load(qat, weights_only=True)["state_dict"])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_prepared_module_still_loads_it(tmp_path: Path, qat: Path) -> None:
    prepared = load_qat_checkpoint(qat, TinyModule())
    evaluator(tmp_path).test(prepared, ckpt_path=qat, weights_only=True)
    evaluator(tmp_path).test(TinyModule())  # a float module without a checkpoint


def test_a_float_checkpoint_for_a_qat_run(tmp_path: Path, floating: Path) -> None:
    def runner() -> pl.Trainer:
        return trainer(tmp_path, QuantizationAwareTraining(), max_epochs=1, enable_checkpointing=False)

    with pytest.raises(RecipeMismatchError, match=r"load_from_checkpoint.*weights=….*leave ckpt_path out"):
        runner().fit(TinyModule(), ckpt_path=floating)
    runner().fit(TinyModule.load_from_checkpoint(floating, weights_only=True))


def test_lightnings_own_words_name_the_recipe(qat: Path) -> None:
    with pytest.raises(RuntimeError, match=r"model\._qat_recipe"):
        TinyModule.load_from_checkpoint(qat, weights_only=True)


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"mode": "eager"}, "QuantStub|mode is 'eager' in the network and 'fx' in the state dict"),
        ({"overrides": {"fc": None}}, "quantized layers differ"),
        ({"overrides": {"fc": "qnnpack"}}, r"qparams of \d+ fake-quantizes differ"),
        ({"backend": "onednn"}, r"qparams of \d+ fake-quantizes differ"),
    ],
)
def test_a_resume_with_other_settings(
    tmp_path: Path, qat: Path, settings: dict[str, Any], difference: str
) -> None:
    with engine("x86"), pytest.raises((RecipeMismatchError, ValueError), match=difference):
        trainer(tmp_path, QuantizationAwareTraining(**settings), max_epochs=2).fit(
            TinyModule(), ckpt_path=qat
        )
