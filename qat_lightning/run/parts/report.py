"""Makes the report of a run: records curves during the run, and measures the results at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from qat_lightning.base import random_state
from qat_lightning.quantize.copies import copy_of
from qat_lightning.quantize.recipe import quantized_networks
from qat_lightning.report.build import FinishedRun, publish
from qat_lightning.report.curves import Curves
from qat_lightning.run import trainer_facts
from qat_lightning.run.conversion import ConversionResult
from qat_lightning.run.part import Part
from qat_lightning.run.parts.first_batch import FirstBatch
from qat_lightning.run.parts.scores import Shipped, score_all


class RunReport(Part):
    """Records a report's data during a run, and writes the report at the end.

    Args:
        write: Whether to write a report. Curves are recorded in any case.
        first_batch: Holds the networks' inputs in the first batch, which are used if there is no validation.
        shipped: Makes a fresh module run an exported file.

    Attributes:
        curves: The metrics of each epoch, and the epochs at which phases began.
    """

    def __init__(self, *, write: bool, first_batch: FirstBatch, shipped: Shipped) -> None:
        self.curves = Curves()
        self._write, self._first_batch, self._shipped = write, first_batch, shipped
        self._start: pl.LightningModule | None = None
        self._networks: Mapping[str, nn.Module] = {}

    def before_prepare(self, trainer: pl.Trainer, module: pl.LightningModule, names: Sequence[str]) -> None:
        """Keeps a copy of a module that is not yet prepared, to score the float network at the end."""
        self.curves.clear()
        if self._write and trainer.is_global_zero and next(quantized_networks(module), None) is None:
            self._start = copy_of(module).cpu()

    def after_prepare(self, module: pl.LightningModule, networks: Mapping[str, nn.Module]) -> None:
        self._networks = networks

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._record(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._record(trainer)

    def after_conversion(self, trainer: pl.Trainer, result: ConversionResult, folder: Path) -> None:
        """Measures everything, writes the report to `folder` and prints it. A failure is only a warning."""
        if not self._write or result.trained is None or trainer_facts.is_fast_dev_run(trainer):
            return
        try:
            with random_state.preserved():
                scores, caught = score_all(trainer, result, self._start, [*self._networks], self._shipped)
                run = FinishedRun(
                    title=type(result.trained).__name__,
                    source=result.source,
                    trained=result.trained,
                    int8=result.module,
                    inputs={**self._first_batch.inputs, **caught},
                    files=result.files,
                    scores=scores,
                    curves=self.curves,
                )
                page = publish(run, folder)
            rank_zero_info(f"Report: {page}")
        except Exception as error:  # any error, since the weights and the int8 files are written already
            rank_zero_warn(
                f"The report could not be made: {error} ({type(error).__name__}). All other files of the run "
                "are written."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"curves": self.curves.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the curves of a checkpoint, if it has any.

        The float copy is dropped: the resumed run may have started from other float weights.
        """
        self._start = None
        if state.get("curves") is not None:
            self.curves.load_state_dict(state["curves"])

    def _record(self, trainer: pl.Trainer) -> None:
        rate = trainer_facts.highest_learning_rate(trainer)
        self.curves.record(trainer.current_epoch, trainer.callback_metrics, rate)
