"""Silences the warnings of `torch.ao` that no user can act on, and only those, around our own calls."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# The beginnings of the messages, as `warnings.filterwarnings` matches them.
_MESSAGES = (
    r"torch\.ao\.quantization is deprecated",
    r"\s*Please use quant_min and quant_max to specify the range for observers",
    r"torch\.quantize_per_tensor, torch\.quantize_per_channel and other quantized tensor creation",
    r"must run observer before calling calculate_qparams",  # said in our own words where it matters
    r"TypedStorage is deprecated",  # torch.load of a quantized tensor
    r"_aminmax is deprecated",
    r"Detected pickle protocol",  # torch.load of a file that is then refused
)


@contextmanager
def quiet_torch_ao() -> Iterator[None]:
    """Ignores `torch.ao`'s deprecation and range warnings inside the `with` block."""
    with warnings.catch_warnings():
        for message in _MESSAGES:
            warnings.filterwarnings("ignore", message=message)
        yield


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Silences what the ONNX tools log about their own work, except errors, inside the `with` block."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what went wrong is seen by running the file
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
