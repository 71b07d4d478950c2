"""What else a Trainer holds that would break quantization-aware training: refused before it, with the fix."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from qat_lightning.base.atomic import check_writable
from qat_lightning.run import trainer_facts


def check_package(trainer: object, module: object) -> None:
    """Raises a `MisconfigurationException` if they are of the package `pytorch_lightning`."""
    for value, kind in ((trainer, pl.Trainer), (module, pl.LightningModule)):
        if not isinstance(value, kind):
            raise MisconfigurationException(
                f"qat_lightning works with `lightning.pytorch`, but {type(value).__module__}."
                f"{type(value).__qualname__} is no lightning.pytorch.{kind.__name__}: the package "
                "`pytorch_lightning` has classes of its own, and the two do not mix. Replace "
                "`import pytorch_lightning as pl` by `import lightning.pytorch as pl`."
            )


def check_output(trainer: pl.Trainer, folder: Path | None) -> None:
    """Raises a `MisconfigurationException` if rank 0 could not write to `folder` at the end of the run."""
    if folder is None or not trainer.is_global_zero or vars(trainer).get("fast_dev_run"):
        return
    try:
        check_writable(folder)
    except OSError as error:
        raise MisconfigurationException(
            f"output_dir must be a folder that can be written to, but {folder} cannot: {error}. Choose "
            "another one."
        ) from error


def check_callbacks(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Raises a `MisconfigurationException` if another callback would work on layers that are not trained."""
    callbacks, own = trainer_facts.callbacks(trainer), type(callback).__name__
    for i, other in enumerate(callbacks):
        name = type(other).__name__
        if isinstance(other, ModelPruning):
            raise MisconfigurationException(
                f"{name} leaves out every convolution that is fused with its batch-norm, as it leaves out "
                "containers. Prune in a float run, then train the pruned weights for int8. A gradient of 0 "
                "keeps a zero: parameter.register_hook(lambda grad, kept=parameter != 0: grad * kept)."
            )
        if isinstance(other, WeightAveraging | StochasticWeightAveraging) and i < callbacks.index(callback):
            raise MisconfigurationException(
                f"{name} comes before {own} and would average the float layers that the preparation for "
                f"quantization replaces. Pass it after: Trainer(callbacks=[{own}(...), {name}(...)])."
            )


def check_loggers(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raises a `MisconfigurationException` if a logger would trace the prepared module by TorchScript."""
    traced = module.example_input_array is not None
    for logger in trainer.loggers:
        if traced and isinstance(logger, TensorBoardLogger) and logger._log_graph:
            raise MisconfigurationException(
                "TensorBoardLogger(log_graph=True) traces the module by TorchScript, which knows no in-place "
                "autograd functions, and fake-quantization is made of them. Leave log_graph out, and for a "
                "graph log the float network before fit: logger.experiment.add_graph(network, batch)."
            )
