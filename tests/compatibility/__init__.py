"""What of Lightning works beside the callback: a registry of rows, each with the run that proves it."""

from tests.compatibility import (  # each registers its rows, in this order
    averaging,
    callbacks,
    checkpoints,
    computation,
    loggers,
    options,
    packages,
    tuning,
)
from tests.compatibility.registry import ROWS, Row, page

__all__ = [
    "ROWS",
    "Row",
    "averaging",
    "callbacks",
    "checkpoints",
    "computation",
    "loggers",
    "options",
    "packages",
    "page",
    "tuning",
]
