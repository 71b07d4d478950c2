"""The preflight of a run: at the first training batch, on copies of the networks, with their real inputs."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from qat_lightning.analysis.inputs import Catcher, Inputs
from qat_lightning.analysis.preflight.dry_run import dry_run
from qat_lightning.analysis.preflight.network_report import NetworkReport
from qat_lightning.base import random_state
from qat_lightning.base.errors import PreflightError
from qat_lightning.quantize.copies import copy_of
from qat_lightning.run import trainer_facts


class FirstBatch:
    """Catches what the first batch gives the networks, and tries them with it.

    Attributes:
        reports: What became of each network that the first batch reached, on rank 0.
        inputs: What the first batch gave each network.
    """

    def __init__(self) -> None:
        self.reports: list[NetworkReport] = []
        self.inputs: dict[str, Inputs] = {}
        self._networks: Mapping[str, nn.Module] = {}
        self._catcher: Catcher | None = None
        self._done = False

    def watch(self, module: pl.LightningModule, networks: Mapping[str, nn.Module]) -> None:
        """Begins to catch inputs, unless that was done before, or would have compiled code compiled again."""
        if self._done:
            return
        self._done = True
        if trainer_facts.is_compiled(module):
            rank_zero_info("Preflight is left out, because the module is compiled")
            return
        self._networks, self._catcher = networks, Catcher(networks.values())

    def try_out(self, trainer: pl.Trainer, *, dry_run: bool = True) -> None:
        """Keeps what was caught and tries it, once: rank 0 does, and all ranks get the verdict.

        Args:
            trainer: The Trainer.
            dry_run: Whether to try it.

        Raises:
            PreflightError: On every rank, if a network would not convert or run.
        """
        if self._catcher is None:
            return
        catcher, self._catcher = self._catcher, None
        catcher.close()
        caught = {name: catcher.caught.get(network) for name, network in self._networks.items()}
        self.inputs |= {name: inputs for name, inputs in caught.items() if inputs is not None}
        if not dry_run:
            return
        error = self._dry_run_all() if trainer.is_global_zero else None
        if trainer.world_size > 1:
            error = trainer.strategy.broadcast(error)
        if error is not None:
            raise error
        for report in self.reports:
            rank_zero_info(f"Preflight: {report}")

    def stop(self) -> None:
        """Removes the hooks, if a run ended before its first batch did."""
        if self._catcher is not None:
            self._catcher.close()
            self._catcher = None

    def _dry_run_all(self) -> PreflightError | None:
        try:
            with random_state.preserved():
                for name, inputs in self.inputs.items():
                    copy = copy_of(self._networks[name]).cpu()
                    self.reports.append(dry_run(name, copy, inputs))
        except PreflightError as error:
            return error
        except Exception as error:  # a flaw of the preflight is no reason to stop a run
            rank_zero_warn(
                f"The preflight itself failed, and training goes on: {type(error).__name__}: {error}"
            )
        return None
