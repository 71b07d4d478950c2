"""The private names of Lightning, each behind a named function.

A new version of Lightning may change any of them; `tests/test_internals.py` then names the broken one.
Packages below the callbacks use these functions on a LightningModule, and so need not import Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.fabric.plugins import ClusterEnvironment
    from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
    from lightning.pytorch.loggers import TensorBoardLogger
    from torch import nn
    from torch.optim.swa_utils import AveragedModel


# Modules.


def is_compiled(module: pl.LightningModule) -> bool:
    """Returns whether a LightningModule was compiled before it was passed to the Trainer."""
    return module._compiler_ctx is not None


def forget_original(copied: nn.Module) -> None:
    """Makes a deep copy of a LightningModule independent of the original, and not compiled."""
    if hasattr(copied, "_metric_attributes"):
        # Lightning's cache of metric names, whose keys are the ids of the original's metrics.
        vars(copied)["_metric_attributes"] = None
    for name in vars(copied).get("_compiler_ctx") or ():
        # Lightning's compiled methods are bound to the original.
        vars(copied).pop(name.removeprefix("original_"), None)
        vars(copied)["_compiler_ctx"] = None


# The Trainer.


def configure_model(trainer: pl.Trainer) -> None:
    """Calls the module's `configure_model` within the contexts that Lightning uses."""
    from lightning.pytorch.trainer import call

    call._call_configure_model(trainer)


def cluster_environment(trainer: pl.Trainer) -> ClusterEnvironment:
    """Returns the cluster environment of the Trainer, such as SLURM's."""
    return trainer._accelerator_connector.cluster_environment


def synchronizes_batch_norm(trainer: pl.Trainer) -> bool:
    """Returns whether the Trainer turns batch-norms into synchronized ones."""
    return getattr(trainer.strategy, "_layer_sync", None) is not None


def start_method(trainer: pl.Trainer) -> str | None:
    """Returns the start method of the strategy's processes, or None if it neither forks nor spawns them."""
    return getattr(trainer.strategy.launcher, "_start_method", None)


def writes_graph(logger: TensorBoardLogger) -> bool:
    """Returns whether a TensorBoardLogger writes the module's graph."""
    return bool(logger._log_graph)


# The loops.


def accumulates(trainer: pl.Trainer) -> bool:
    """Returns whether the last batch only accumulated gradients."""
    return trainer.fit_loop._should_accumulate()


def has_begun_epoch(trainer: pl.Trainer) -> bool:
    """Returns whether there is an iterator over the training data."""
    return trainer.fit_loop._data_fetcher is not None


def renew_iterator(trainer: pl.Trainer) -> None:
    """Makes a new iterator over the training data."""
    assert trainer.fit_loop._data_fetcher is not None
    iter(trainer.fit_loop._data_fetcher)


def validates_now(trainer: pl.Trainer) -> bool:
    """Returns whether a validation follows the current training batch."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def forget_restart(trainer: pl.Trainer) -> None:
    """Makes the fit loop forget that it was interrupted."""
    trainer.fit_loop._restarting = False


def training_source(trainer: pl.Trainer) -> Any:
    """Returns the source of the training data."""
    return trainer.fit_loop._data_source


def validation_source(trainer: pl.Trainer) -> Any:
    """Returns the source of the fit loop's validation data."""
    return trainer.fit_loop.epoch_loop.val_loop._data_source


def calibration_source(trainer: pl.Trainer) -> Any:
    """Returns the source of the data of `trainer.validate`."""
    return trainer.validate_loop._data_source


# Callbacks.


def averaged_model(callback: WeightAveraging) -> AveragedModel | None:
    """Returns the averaged model of a WeightAveraging callback, or None before it exists."""
    return callback._average_model


def averages_batch_norms(callback: StochasticWeightAveraging) -> bool:
    """Returns whether StochasticWeightAveraging will re-estimate batch-norm statistics."""
    return bool(callback._model_contains_batch_norm)
