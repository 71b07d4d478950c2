"""Checks the Trainer, its callbacks and loggers, and the callback's arguments before training starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from qat_lightning.base import lightning_internals
from qat_lightning.base.atomic import check_writable
from qat_lightning.run import messages, trainer_facts


def check_package(trainer: object, module: object) -> None:
    """Raises a `MisconfigurationException` if an object is from the package `pytorch_lightning`."""
    for value, kind in ((trainer, pl.Trainer), (module, pl.LightningModule)):
        if not isinstance(value, kind):
            raise MisconfigurationException(
                f"qat_lightning works with `lightning.pytorch`, but {type(value).__module__}."
                f"{type(value).__qualname__} is not a lightning.pytorch.{kind.__name__}: the package "
                "`pytorch_lightning` has classes of its own, and the two do not mix. Replace "
                "`import pytorch_lightning as pl` by `import lightning.pytorch as pl`."
            )


def check_arguments(convert: object, output_dir: str | Path | None, **flags: object) -> None:
    """Checks the callback's arguments that no other class checks.

    Raises:
        ValueError: A value is out of range.
        TypeError: A flag is not a boolean.
    """
    if convert not in ("best", "last", None):
        raise ValueError(f"convert must be 'best', 'last' or None, but received {convert!r}.")
    if output_dir is not None and Path(output_dir).is_file():
        raise ValueError(f"output_dir must be a folder, but {output_dir} is a file.")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, but received {value!r}.")


def check_run(trainer: pl.Trainer, module: pl.LightningModule, callback: pl.Callback) -> None:
    """Raises a `MisconfigurationException` if the Trainer, a callback or a logger does not support QAT."""
    trainer_facts.check_strategy(trainer)
    check_callbacks(trainer, callback)
    check_loggers(trainer, module)


def check_prepared(module: nn.Module, networks: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    """Raises a `MisconfigurationException` if a network was replaced or added after the preparation.

    Args:
        module: The module that is about to be trained.
        networks: The networks that were prepared in it, by name.
        names: Names of the networks that are in it now.
    """
    present = set(module.modules())
    for name, network in networks.items():
        if network not in present:
            raise MisconfigurationException(messages.replaced(name))
    for name in names:
        if name not in networks:
            raise MisconfigurationException(
                f"The network {name!r} appeared after the callback's setup, so it is not prepared for "
                "quantization. Build it in `__init__` or in `configure_model`, not in `setup`."
            )


def check_output(trainer: pl.Trainer, folder: Path | None) -> None:
    """Raises a `MisconfigurationException` if rank 0 cannot write to `folder`."""
    if folder is None or not trainer.is_global_zero or trainer_facts.is_fast_dev_run(trainer):
        return
    try:
        check_writable(folder)
    except OSError as error:
        raise MisconfigurationException(
            f"output_dir must be a folder that can be written to, but {folder} cannot be: {error}. Choose "
            "another one."
        ) from error


def check_callbacks(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Raises a `MisconfigurationException` if another callback prunes, or averages the float layers."""
    callbacks, qat = trainer_facts.callbacks(trainer), type(callback).__name__
    for i, other in enumerate(callbacks):
        name = type(other).__name__
        if isinstance(other, ModelPruning):
            raise MisconfigurationException(
                f"{name} skips containers, and takes every convolution that is fused with its batch-norm for "
                "one. Prune in a float run, then train the pruned weights for int8. To keep zeros, zero "
                "their gradients: parameter.register_hook(lambda grad, kept=parameter != 0: grad * kept)."
            )
        if isinstance(other, WeightAveraging | StochasticWeightAveraging) and i < callbacks.index(callback):
            raise MisconfigurationException(
                f"{name} comes before {qat}, so it would average the float layers, which {qat} replaces. "
                f"Pass it after: Trainer(callbacks=[{qat}(...), {name}(...)])."
            )


def check_loggers(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raises a `MisconfigurationException` if a logger would trace the prepared module with TorchScript."""
    traced = module.example_input_array is not None
    for logger in trainer.loggers:
        if traced and isinstance(logger, TensorBoardLogger) and lightning_internals.writes_graph(logger):
            raise MisconfigurationException(
                "TensorBoardLogger(log_graph=True) traces the module with TorchScript, which does not "
                "support in-place autograd functions, and fake-quantization uses them. Leave log_graph out. "
                "For a graph, log the float network before fit: logger.experiment.add_graph(network, batch)."
            )
