"""Loggers."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.compatibility.callbacks import Exampled
from tests.compatibility.registry import Section
from tests.compatibility.runs import STEPS, check, check_same, fit, refused

row = Section("Loggers")


def logged(logger: CSVLogger, name: str) -> list[float]:
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return [float(line[name]) for line in csv.DictReader(file) if line[name]]


def scalars(folder: Path, name: str) -> list[float]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events: Any = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


@row("CSVLogger", "Trainer(logger=CSVLogger(...))", "works")
def csv_logger(folder: Path) -> None:
    logger = CSVLogger(folder)
    run = fit(folder, logger=logger, log_every_n_steps=1)
    assert len(logged(logger, "train_loss")) == 2 * STEPS
    assert len(logged(logger, "val_loss")) == 2
    check_same(run, fit(folder))
    check(run)


@row("TensorBoardLogger", "Trainer(logger=TensorBoardLogger(...))", "works")
def tensorboard_logger(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(folder)
    run = fit(folder, logger=logger, log_every_n_steps=1)
    assert len(scalars(Path(logger.log_dir), "train_loss")) == 2 * STEPS
    check_same(run, fit(folder))
    check(run)


@row(
    "TensorBoardLogger",
    "TensorBoardLogger(..., log_graph=True)",
    "refused: TorchScript cannot trace a prepared network; a graph of the float network can be logged before "
    "fit",
)
def tensorboard_graph(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(folder, log_graph=True)
    match = "traces the module with TorchScript.*Leave log_graph out"
    refused(folder, match, logger=logger, module=Exampled, error=MisconfigurationException)
    module = Exampled()
    before = TensorBoardLogger(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, of its own torch.jit.trace
        before.experiment.add_graph(module.model, torch.zeros(2, 3, 12, 12))
    check(fit(folder, logger=before, module=module))


@row("Several loggers", "Trainer(logger=[CSVLogger(...), TensorBoardLogger(...)])", "works")
def several_loggers(folder: Path) -> None:
    pytest.importorskip("tensorboard")
    comma, board = CSVLogger(folder / "a"), TensorBoardLogger(folder / "b")
    run = fit(folder, logger=[comma, board], log_every_n_steps=1)
    values = scalars(Path(board.log_dir), "train_loss")
    assert values == pytest.approx(logged(comma, "train_loss"))
    assert len(values) == 2 * STEPS
    check(run)
