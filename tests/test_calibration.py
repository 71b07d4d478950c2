"""Ranges are means over the first steps of a run, in which nothing is rounded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small

from qat_lightning import QuantizationAwareTraining
from qat_lightning.base.schedule import Moment, ResolvedSchedule, Schedule
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from qat_lightning.fake_quant.ranges import is_moving_average
from qat_lightning.tasks.data.resumable import ResumableLoader
from tests.networks import CLASSES, same_state
from tests.runs import TinyModule, dataset, trainer

STEPS = 100  # a twentieth are five


class Watch(pl.Callback):
    """Remembers what entered the network, and its input's grid after it."""

    def __init__(self) -> None:
        self.lows: list[Tensor] = []
        self.highs: list[Tensor] = []
        self.ranges: list[tuple[Tensor, Tensor]] = []
        self.rounding: list[bool] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.lows.append(batch[0].min())
        self.highs.append(batch[0].max())
        grids = _grids(pl_module)
        observer = grids[0].activation_post_process
        self.ranges.append((observer.min_val.clone(), observer.max_val.clone()))
        rounding = {bool(grid.fake_quant_enabled.item()) for grid in grids}
        assert len(rounding) == 1
        self.rounding.append(rounding.pop())


class Stop(RuntimeError):
    pass


class StopAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Stop


def _grids(module: nn.Module) -> list[Any]:
    return [grid for _, grid in fake_quantizes(module)]


def test_ranges_are_means_over_the_calibration(tmp_path: Path) -> None:
    watch = Watch()
    qat = QuantizationAwareTraining(freeze_observers_at=None, convert=None)
    trainer(tmp_path, qat, watch, max_steps=STEPS, max_epochs=-1).fit(TinyModule())
    assert watch.rounding == [False] * 5 + [True] * (STEPS - 5)
    low, high = 0.0, 0.0
    for step, found in enumerate(watch.ranges):
        share = 1 / (step + 1) if step < 5 else 0.01
        low += share * (float(watch.lows[step]) - low)
        high += share * (float(watch.highs[step]) - high)
        torch.testing.assert_close(torch.stack(found).flatten(), torch.tensor([low, high]))
    assert low != float(watch.lows[0])


def test_a_run_that_is_resumed_in_its_calibration(tmp_path: Path) -> None:
    def run(folder: Path, *callbacks: pl.Callback, **options: Any) -> TinyModule:
        pl.seed_everything(0)
        module = TinyModule()
        qat = QuantizationAwareTraining(freeze_observers_at=0.5)
        batches = ResumableLoader(dataset(160), batch_size=8)
        trainer(folder, qat, *callbacks, max_steps=STEPS, max_epochs=-1).fit(module, batches, **options)
        return module

    whole = run(tmp_path / "whole")

    class SaveAt(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "third.ckpt")

    with pytest.raises(Stop):
        run(tmp_path / "part", SaveAt(), StopAt(4))
    resumed = run(tmp_path / "part", ckpt_path=tmp_path / "third.ckpt", weights_only=False)
    assert same_state(whole.state_dict(), resumed.state_dict()) == []


@pytest.mark.slow
def test_a_torchvision_network(tmp_path: Path) -> None:
    class Wide(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((nn.functional.interpolate(batch[0], scale_factor=2), batch[1]), 0)

    watch = Watch()
    qat = QuantizationAwareTraining(convert=None)
    module = Wide(mobilenet_v3_small(num_classes=CLASSES))
    trainer(tmp_path, qat, watch, max_steps=40, max_epochs=-1, limit_val_batches=0).fit(module)
    assert watch.rounding == [False] * 2 + [True] * 38
    assert {grid.averaging.item() for grid in _grids(module) if is_moving_average(grid)} == {0}


@pytest.mark.parametrize(
    ("asked", "total", "steps"), [(8, 1000, 8), (8, 100, 5), (8, 19, 0), (8, math.inf, 8), (0, 1000, 0)]
)
def test_a_short_run_is_calibrated_for_a_twentieth(asked: int, total: float, steps: int) -> None:
    resolved = Schedule(None, 0, 0, asked).resolve(total)
    assert resolved.calibrated == Moment(step=steps)
    assert [resolved.phase(0, step).fake_quant for step in range(9)] == [step >= steps for step in range(9)]
    assert [resolved.phase(0, step).observe for step in range(9)] == [
        step < max(1, steps) for step in range(9)
    ]


def test_a_checkpoint_from_before_there_was_a_calibration() -> None:
    state = Schedule(None, 0.5, 0, 8).resolve(1000).state_dict()
    del state["calibrated"]
    assert ResolvedSchedule.from_state_dict(state).phase(0, 0).fake_quant


@pytest.mark.parametrize("steps", [-1, 0.5, True, None])
def test_what_is_no_number_of_steps(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"calibration_steps is a number of steps, .* but received"):
        QuantizationAwareTraining(calibration_steps=steps)
