"""Silences warnings of `torch.ao` and of the ONNX exporters that no user can act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Regular expressions for the beginnings of the messages.
_MESSAGES = (
    r"torch\.ao\.quantization is deprecated",
    r"\s*Please use quant_min and quant_max to specify the range for observers",
    r"torch\.quantize_per_tensor, torch\.quantize_per_channel and other quantized tensor creation",
    r"must run observer before calling calculate_qparams",  # where it matters, this package raises an error
    r"TypedStorage is deprecated",  # torch.load of a quantized tensor
    r"_aminmax is deprecated",
    r"Detected pickle protocol",  # torch.load of a file that is refused right after
)


@contextmanager
def quiet_torch_ao() -> Iterator[None]:
    """Ignores the warnings in `_MESSAGES` inside the `with` block, and no others."""
    with warnings.catch_warnings():
        for message in _MESSAGES:
            warnings.filterwarnings("ignore", message=message)
        yield


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Silences all warnings, and the ONNX tools' log lines except errors, inside the `with` block."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # running the file shows what went wrong
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
