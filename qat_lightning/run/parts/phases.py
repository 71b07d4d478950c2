"""The phases of a run: when observers, fake-quantization and batch-norm statistics are on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from qat_lightning.base.schedule import Phase, ResolvedSchedule, Schedule
from qat_lightning.fake_quant.phases import average_over, enter, keep_inputs
from qat_lightning.run import messages, trainer_facts
from qat_lightning.run.distributed.merge_ranges import merge_ranges
from qat_lightning.run.part import Part


class Phases(Part):
    """Puts the prepared networks into the phase of each epoch and step.

    Args:
        schedule: The requested schedule.
        phase_at: Returns the phase of a Trainer's next step.
        mark: Records an epoch and what begins in it.
    """

    def __init__(
        self,
        schedule: Schedule,
        phase_at: Callable[[pl.Trainer], Phase],
        mark: Callable[[int, str], None],
    ) -> None:
        self._schedule, self._phase_at, self._mark = schedule, phase_at, mark
        self._networks: Mapping[str, nn.Module] = {}
        self._resolved: ResolvedSchedule | None = None
        self._phase: Phase | None = None
        self._warned: set[str] = set()

    def planned(self, trainer: pl.Trainer) -> Phase:
        """Returns the phase that the schedule has for the next step of `trainer`."""
        assert self._resolved is not None
        return self._resolved.phase(trainer.current_epoch, trainer_facts.steps_done(trainer))

    def check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._resolved = self._phase = None
        if math.isinf(trainer_facts.epochs(trainer)) and trainer.max_steps == -1:
            self._schedule.resolve(math.inf)  # raises if the length of the run is needed

    def after_prepare(self, module: pl.LightningModule, networks: Mapping[str, nn.Module]) -> None:
        self._networks = networks

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._resolved is None:  # else it is from a checkpoint
            self._resolved = self._schedule.resolve(trainer_facts.steps(trainer))
        messages.warn_of_unreached(trainer, self._schedule, self._resolved, self._warned)
        if trainer_facts.is_compiled(module):
            keep_inputs(module)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._enter(trainer, module)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._phase_at(trainer) != self._phase:
            self._enter(trainer, module)
        self._calibrate(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "schedule": None if self._resolved is None else self._resolved.state_dict(),
            "asked": asdict(self._schedule),
            "phase": None if self._phase is None else self._phase._asdict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the schedule of the checkpoint, whatever the length of the new run."""
        if state["schedule"] is not None:
            self._resolved = ResolvedSchedule.from_state_dict(state["schedule"])
        now = asdict(self._schedule)
        started_with = now | state.get("asked", {})
        if started_with != now:
            rank_zero_warn(
                f"The run was started with the schedule {started_with} and keeps it. The schedule passed "
                f"now, {now}, has no effect. To change it, start anew from the weights."
            )

    def _enter(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        before, phase = self._phase, self._phase_at(trainer)
        if before is not None and (before.observe > phase.observe or before.fake_quant < phase.fake_quant):
            merge_ranges(module)
        for network in self._networks.values():
            enter(network, phase)
        self._phase = phase
        for what in messages.announce(trainer, before, phase):
            self._mark(trainer.current_epoch, what)

    def _calibrate(self, trainer: pl.Trainer) -> None:
        """Averages ranges over the calibration steps, and makes them moving averages afterwards."""
        assert self._resolved is not None
        done, calibrated = trainer_facts.steps_done(trainer), self._resolved.calibrated.step
        if calibrated and done <= calibrated:
            for network in self._networks.values():
                average_over(network, done + 1 if done < calibrated else None)
