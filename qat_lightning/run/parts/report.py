"""The report of a Trainer's run: what is gathered on the way, and what is measured at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from qat_lightning.analysis.inputs import Inputs
from qat_lightning.base import random_state
from qat_lightning.quantize.copies import copy_of
from qat_lightning.quantize.recipe import quantized_networks
from qat_lightning.report.build import FinishedRun, publish
from qat_lightning.report.curves import Curves
from qat_lightning.run.conversion import ConversionResult
from qat_lightning.run.parts.scores import Shipped, score_all


class RunReport:
    """Gathers what a report needs while a run goes on, and writes it at the end.

    Attributes:
        curves: The course of the training.
    """

    def __init__(self) -> None:
        self.curves = Curves()
        self._start: pl.LightningModule | None = None

    def begin(self, module: pl.LightningModule, *, keep: bool) -> None:
        """Begins with a run; a module that is still float is copied with `keep`, to score it at the end."""
        self.curves.clear()
        if keep and next(quantized_networks(module), None) is None:
            self._start = copy_of(module).cpu()

    def resume(self, curves: Mapping[str, Any] | None) -> None:
        """Goes on with the curves of a checkpoint, None in one of an earlier version.

        The copy is forgotten: the run began elsewhere, and its module need not have held those weights.
        """
        self._start = None
        if curves is not None:
            self.curves.load_state_dict(curves)

    def write(
        self,
        trainer: pl.Trainer,
        outcome: ConversionResult,
        inputs: Mapping[str, Inputs],
        names: Sequence[str],
        shipped: Shipped,
        folder: Path,
    ) -> None:
        """Measures everything, writes it to `folder` and prints it. A failure is a warning and no more.

        Args:
            trainer: The Trainer, at the end of fit.
            outcome: What the conversion gave.
            inputs: What the first batch gave each network; used where there is no validation.
            names: Names of the prepared networks.
            shipped: Puts what a file holds in the place of a network of a module.
            folder: Where to write.
        """
        assert outcome.trained is not None
        try:
            with random_state.preserved():
                scores, caught = score_all(trainer, outcome, self._start, names, shipped)
                run = FinishedRun(
                    title=type(outcome.trained).__name__,
                    source=outcome.source,
                    trained=outcome.trained,
                    int8=outcome.module,
                    inputs={**inputs, **caught},
                    files=outcome.files,
                    scores=scores,
                    curves=self.curves,
                )
                page = publish(run, folder)
            rank_zero_info(f"Report: {page}")
        except Exception as error:  # whatever it is, the weights and the int8 files are written
            rank_zero_warn(
                f"The report could not be made: {error} ({type(error).__name__}). Everything else of the run "
                "is written."
            )
