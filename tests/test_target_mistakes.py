"""What a target cannot be reached or measured for is said before the training."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from qat_lightning import AccuracyTarget, TargetError
from tests.networks import same_state
from tests.runs import TinyModule, trainer
from tests.target_runs import DROP, METRIC, Faithful, bad, callback, fit

ASKED = AccuracyTarget(DROP, METRIC, "max")


class NoSteps(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("no training was expected")


def test_a_target_that_cannot_be_reached(tmp_path: Path) -> None:
    module = bad()
    before = copy.deepcopy(module.state_dict())
    qat = callback(AccuracyTarget(0))
    for _ in range(2):
        with pytest.raises(TargetError, match="Int8 must lose at most 0 points"):
            fit(tmp_path, module, NoSteps(), qat=qat)
    assert same_state(module.state_dict(), before) == []  # float again


@pytest.mark.parametrize("first", [True, False])
def test_a_finder_of_learning_rates_does_not_hide_it(tmp_path: Path, first: bool) -> None:
    finder, qat = LearningRateFinder(num_training_steps=3), callback(replace(ASKED, max_drop=0))
    runner = trainer(tmp_path, *([finder, qat] if first else [qat, finder]), max_epochs=1)
    with pytest.raises(TargetError):
        runner.fit(bad())


def test_an_untrained_network(tmp_path: Path) -> None:
    qat = callback(AccuracyTarget(metric="val_loss", mode="min"))
    with pytest.raises(TargetError, match="not trained: no batch-norm in it has seen data"):
        trainer(tmp_path, qat, NoSteps(), max_epochs=1).fit(TinyModule())


def test_a_ckpt_path_that_is_left_over(tmp_path: Path) -> None:
    runner = trainer(tmp_path, callback(ASKED), max_epochs=1)
    runner.ckpt_path = "left.ckpt"
    runner._checkpoint_connector._user_managed = False  # as after a fit that was given it
    with pytest.raises(MisconfigurationException, match=r"left\.ckpt, so that .* no weights were loaded"):
        runner.fit(bad())


class LateData(Faithful):
    def setup(self, stage: str) -> None:
        self.late = self.own

    def val_dataloader(self) -> DataLoader[Any]:
        return self.late


class TwoLoaders(Faithful):
    def val_dataloader(self) -> Any:
        return [self.own, self.own]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


class Unvalidated(Faithful):
    val_dataloader = pl.LightningModule.val_dataloader  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize(
    ("kind", "target", "trainer_options", "message"),
    [
        (Faithful, AccuracyTarget(DROP), {}, "no ModelCheckpoint monitors one"),
        (Faithful, AccuracyTarget(DROP, METRIC), {}, f"more or less of '{METRIC}' is better"),
        (Faithful, replace(ASKED, metric="val_fidelty"), {}, "Nearest: 'val_fidelity'"),
        (Faithful, ASKED, {"limit_val_batches": 0}, "this run has none"),
        (Unvalidated, ASKED, {}, "this run has none"),
        (LateData, ASKED, {}, r"before LightningModule\.setup runs"),
        (TwoLoaders, ASKED, {}, "one validation loader, but this run has 2"),
    ],
)
def test_what_cannot_be_measured(
    tmp_path: Path, kind: type[Faithful], target: AccuracyTarget, trainer_options: Any, message: str
) -> None:
    runner = trainer(tmp_path, callback(target), NoSteps(), max_epochs=1, **trainer_options)
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        runner.fit(kind(bad().model))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_drop": -1}, ValueError, "max_drop must be at least 0 and finite, but received -1"),
        ({"max_drop": float("nan")}, ValueError, "max_drop must be at least 0 and finite"),
        ({"max_drop": "0.5"}, TypeError, "a number of percentage points, but received '0.5'"),
        ({"max_drop": True}, TypeError, "a number of percentage points"),
        ({"metric": len}, TypeError, "keep_for_target takes functions"),
        ({"mode": "maximum"}, ValueError, "must be 'max', 'min' or None, but received 'maximum'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AccuracyTarget(**options)
