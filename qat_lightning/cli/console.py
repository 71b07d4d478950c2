"""The terminal output of `qat-train`: a table, and log lines without Lightning's own tips."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning
from rich.console import Console
from rich.table import Table

from qat_lightning.analysis.preflight.network_report import NetworkReport, preflight_table

_LIGHTNING = str(Path(lightning.__file__).parent)

# Lightning's warnings about things that a user of the command cannot or should not change.
_ADVICE = (
    "The '.*_dataloader' does not have many workers",  # small data sets load fastest without workers
    "The number of training batches .* is smaller than the logging interval",
    "GPU available but not used",  # trainer=cpu
    "Checkpoint directory .* exists and is not empty",  # a run continues in the same folder
    "The dirpath has changed from",  # a run continues in another folder
    r"`\.fit\(ckpt_path=None\)` was called without a model",  # OnExceptionCheckpoint, in the first run
    r"\.fit\(ckpt_path=\"last\"\) is set, but there is no last checkpoint",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # inside Lightning
)


class WithoutLightningNews(logging.Filter):
    """Drops Lightning's own log lines below a warning. Lines that others log through its logger stay."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether to keep a log line."""
        return record.levelno >= logging.WARNING or not record.pathname.startswith(_LIGHTNING)


def ignore_advice() -> None:
    """Ignores Lightning's warnings about choices that the configuration makes, in this process."""
    for message in _ADVICE:
        warnings.filterwarnings("ignore", message=message)


def print_results(metrics: Mapping[str, Any]) -> None:
    """Prints the accuracies and sizes of `metrics.json` as a table, and the paths of the files.

    Args:
        metrics: The result of :func:`qat_lightning.cli.train.train`.
    """
    table = Table()
    for column in ("network", "test accuracy", "size"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, key, size in (
        ("float", "float_accuracy", "float_bytes"),
        ("int8 without training", "post_training_accuracy", None),
        ("fake-quant", "fake_quant_accuracy", None),
        ("int8", "int8_accuracy", "int8_bytes"),
    ):
        if metrics.get(key) is not None:
            table.add_row(name, percent(metrics[key]), kilobytes(metrics[size]) if size else "")
    for path, scores in metrics.get("exported", {}).items():
        if not path.endswith(".pt"):
            table.add_row(Path(path).name, percent(scores["accuracy"]), kilobytes(scores["bytes"]))
    # On a narrow or captured terminal, paths stay whole so that they can be copied.
    console = Console(soft_wrap=True)
    console.print(table)
    for name, key in (("float", "float_path"), ("from", "checkpoint"), ("int8", "int8_path")):
        if metrics[key] is not None:
            console.print(f"{name:6} {metrics[key]}", highlight=False)


def print_preflight(reports: Iterable[NetworkReport]) -> None:
    """Prints the result of a preflight as a table."""
    Console().print(preflight_table(reports))


def percent(accuracy: float) -> str:
    """Formats an accuracy between 0 and 1.

    Example:
        >>> percent(0.98765)
        '98.77 %'
    """
    return f"{100 * accuracy:.2f} %"


def kilobytes(size: float) -> str:
    """Formats a number of bytes.

    Example:
        >>> kilobytes(226_341)
        '226 kB'
    """
    return f"{size / 1000:.0f} kB"
