"""`Part`: the base class of the callback's parts, each of which handles one concern of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from qat_lightning.run.conversion import ConversionResult


class Part:
    """One concern of a quantization-aware training run.

    :class:`qat_lightning.QuantizationAwareTraining` holds a list of parts. Each of its hooks calls the hook
    of the same name on every part, in the order of the list. A part overrides the hooks that it needs. Hooks
    with a name from Lightning run when Lightning's do; the others are described below.
    """

    # Before the run.

    def check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Resets the state of an earlier run, and raises if this one cannot work. Nothing is changed yet."""

    def before_prepare(self, trainer: pl.Trainer, module: pl.LightningModule, names: Sequence[str]) -> None:
        """Runs before the float networks `names` are prepared."""

    def after_prepare(self, module: pl.LightningModule, networks: Mapping[str, nn.Module]) -> None:
        """Receives the prepared networks. Runs again if a checkpoint makes another preparation necessary."""

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None: ...

    # The run.

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None: ...

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None: ...

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None: ...

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None: ...

    def on_after_backward(self, trainer: pl.Trainer, module: pl.LightningModule) -> None: ...

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule) -> None: ...

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None: ...

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None: ...

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None: ...

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None: ...

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None: ...

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None: ...

    def on_evaluation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Runs when a validation, a test or a prediction starts."""

    def on_evaluation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Runs when a validation, a test or a prediction ends."""

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule) -> None: ...

    # After the run.

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None: ...

    def after_conversion(self, trainer: pl.Trainer, result: ConversionResult, folder: Path) -> None:
        """Receives the int8 module and the files that were written to `folder`."""

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Returns this part's share of the callback's state, as plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores this part's share of the callback's state. Older checkpoints may lack a key."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None: ...

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None: ...
