"""Captures the networks' inputs in the first batch, and dry-runs copies of the networks on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from qat_lightning.analysis.preflight.dry_run import dry_run
from qat_lightning.analysis.preflight.network_report import NetworkReport
from qat_lightning.base import random_state
from qat_lightning.base.errors import PreflightError
from qat_lightning.base.inputs import Catcher, Inputs
from qat_lightning.base.torch_internals import tree_leaves
from qat_lightning.quantize.copies import copy_of
from qat_lightning.run import trainer_facts
from qat_lightning.run.part import Part


class FirstBatch(Part):
    """Captures the inputs of the networks in the first batch, and dry-runs copies of the networks on them.

    Args:
        dry_run: Whether to do the dry run.
        catch: Whether another part needs the inputs.
        store: Whether checkpoints hold the inputs, for a run that is resumed after its last step.

    Attributes:
        reports: The result of the dry run of each network that the first batch reached, on rank 0.
        inputs: The inputs of each network in the first batch.
    """

    def __init__(self, *, dry_run: bool, catch: bool, store: bool) -> None:
        self.reports: list[NetworkReport] = []
        self.inputs: dict[str, Inputs] = {}
        self._dry_run, self._catch, self._store = dry_run, catch, store
        self._networks: Mapping[str, nn.Module] = {}
        self._catcher: Catcher | None = None
        self._done = False

    def after_prepare(self, module: pl.LightningModule, networks: Mapping[str, nn.Module]) -> None:
        self._networks = networks

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Starts to capture inputs, unless they were captured before or the module is compiled."""
        if self._done or not (self._dry_run or self._catch):
            return
        self._done = True
        if trainer_facts.is_compiled(module):
            rank_zero_info("Preflight is skipped, because the module is compiled")
            return
        self._catcher = Catcher(self._networks.values())

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keeps the inputs, and does the dry run on rank 0. All ranks get its result.

        Raises:
            PreflightError: A network would not convert or run. Every rank raises it.
        """
        if self._catcher is None:
            return
        catcher, self._catcher = self._catcher, None
        catcher.close()
        self.inputs |= catcher.named(self._networks)
        if not self._dry_run:
            return
        error = self._dry_run_all() if trainer.is_global_zero else None
        if trainer.world_size > 1:
            error = trainer.strategy.broadcast(error)
        if error is not None:
            raise error
        for report in self.reports:
            rank_zero_info(f"Preflight: {report}")

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Removes the hooks if the run ended within its first batch."""
        if self._catcher is not None:
            self._catcher.close()
            self._catcher = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the inputs if they are plain values, which a checkpoint can hold."""
        if not self._store or not all(map(_is_plain, tree_leaves(list(self.inputs.values())))):
            return {"inputs": {}}
        return {"inputs": {name: inputs._asdict() for name, inputs in self.inputs.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, each in state.get("inputs", {}).items():
            self.inputs[name] = Inputs(tuple(each["args"]), each["kwargs"])

    def _dry_run_all(self) -> PreflightError | None:
        try:
            with random_state.preserved():
                for name, inputs in self.inputs.items():
                    copy = copy_of(self._networks[name]).cpu()
                    self.reports.append(dry_run(name, copy, inputs))
        except PreflightError as error:
            return error
        except Exception as error:  # a bug in the preflight must not stop the run
            rank_zero_warn(
                f"The preflight itself failed, and training continues: {type(error).__name__}: {error}"
            )
        return None


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, torch.Tensor | int | float | str)
