"""Converts at the end of a run: rank 0 converts and writes files, and every rank gets the same result."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch

from qat_lightning.base.atomic import replacing
from qat_lightning.base.errors import ConversionError
from qat_lightning.base.quiet import quiet_torch_ao
from qat_lightning.quantize.convert import convert, convert_in_place
from qat_lightning.quantize.copies import copy_of
from qat_lightning.quantize.int8_file import load_packed
from qat_lightning.run.chosen_weights import Choice, choose_weights
from qat_lightning.run.distributed.processes import fail_together

Write = Callable[[pl.LightningModule, pl.LightningModule, dict[str, float]], Sequence[Path]]


class ConversionResult(NamedTuple):
    """The result of a conversion.

    Attributes:
        module: The int8 LightningModule, on the CPU in eval mode.
        files: The files that were written and that this rank can see, `int8.pt` first.
        source: The checkpoint whose weights were converted, or `"last"`.
        why: Why these weights were chosen.
        trained: On rank 0, the prepared LightningModule with the weights that were converted.
    """

    module: pl.LightningModule
    files: tuple[Path, ...]
    source: str
    why: str
    trained: pl.LightningModule | None = None


class _Message(NamedTuple):
    """What rank 0 sends to the other ranks: the error, or the result with the int8 state dict as bytes."""

    failure: str | None
    state: bytes = b""
    files: tuple[tuple[str, int, int], ...] = ()
    source: str = ""
    why: str = ""


def convert_on_all_ranks(
    trainer: pl.Trainer, module: pl.LightningModule, which: str, write: Write, folder: Path
) -> ConversionResult:
    """Converts on rank 0. Every rank gets the same int8 module or the same error.

    The int8 state dict is broadcast, so the ranks need no shared file system.

    Args:
        trainer: The Trainer at the end of fit.
        module: The trained LightningModule. It does not change.
        which: `"best"` or `"last"`.
        write: Writes the files and returns their paths. It receives the module with the chosen weights, its
            int8 copy, and the metrics of these weights.
        folder: Where to save the trained weights if the conversion fails and the run has no checkpoint.

    Raises:
        ConversionError: The conversion failed on rank 0. Every rank raises it.
        RankError: Another rank could not load the result.
    """
    outcome, message, failure = None, None, None
    if trainer.is_global_zero:
        try:
            outcome = _convert(trainer, module, which, write)
            message = _message_of(outcome) if trainer.world_size > 1 else None
        except Exception as error:  # any error, since the other ranks wait for the message
            failure, message = error, _Message(_explain(error, _rescue(trainer, module, folder)))
    if trainer.world_size > 1:
        message = trainer.strategy.broadcast(message)
    if message is not None and message.failure is not None:
        raise ConversionError(message.failure) from failure
    with fail_together("loading the int8 network from rank 0"):
        if outcome is None:
            assert message is not None
            outcome = _receive(module, message)
    return outcome


def _convert(trainer: pl.Trainer, module: pl.LightningModule, which: str, write: Write) -> ConversionResult:
    choice = choose_weights(trainer, which)
    chosen = _with_weights(module, choice)
    int8 = convert(chosen)
    return ConversionResult(
        int8, tuple(write(chosen, int8, choice.metrics)), choice.path or "last", choice.why, chosen
    )


def _with_weights(module: pl.LightningModule, choice: Choice) -> pl.LightningModule:
    if choice.checkpoint is None:
        return module
    module = copy_of(module).cpu()
    module.on_load_checkpoint(choice.checkpoint)
    module.load_state_dict(choice.checkpoint["state_dict"], strict=module.strict_loading)
    return module


def _message_of(outcome: ConversionResult) -> _Message:
    buffer = io.BytesIO()
    torch.save(outcome.module.state_dict(), buffer)
    files = tuple(_identify(path.absolute()) for path in outcome.files)
    return _Message(None, buffer.getvalue(), files, outcome.source, outcome.why)


def _receive(module: pl.LightningModule, message: _Message) -> ConversionResult:
    int8 = convert_in_place(copy_of(module))
    with quiet_torch_ao():
        load_packed(int8, torch.load(io.BytesIO(message.state), weights_only=True))
    # Without a shared file system, the path is missing here or belongs to another run.
    visible = tuple(Path(file[0]) for file in message.files if _is_visible(file))
    return ConversionResult(int8, visible, message.source, message.why)


def _is_visible(file: tuple[str, int, int]) -> bool:
    path = Path(file[0])
    return path.is_file() and _identify(path) == file


def _identify(file: Path) -> tuple[str, int, int]:
    """Returns path, size and time, to tell a file from one with the same path on another file system."""
    status = file.stat()
    return str(file), status.st_size, status.st_mtime_ns


def _rescue(trainer: pl.Trainer, module: pl.LightningModule, folder: Path) -> str:
    """Saves the trained weights if no checkpoint holds them. Returns a sentence that says where they are."""
    written = [getattr(each, "best_model_path", "") for each in trainer.checkpoint_callbacks]
    if any(written):
        return "The trained weights are safe in the run's checkpoints"
    path = folder / "trained.ckpt"
    try:
        with replacing(path) as partial:
            torch.save({"state_dict": module.state_dict()}, partial)
    except OSError as error:
        return (
            f"The run has written no checkpoint, and {path} could not be written either ({error}): the "
            "trained weights are only in memory, in the module passed to fit(). Save them with torch.save"
        )
    return f"The run has written no checkpoint, so the trained weights were written to {path}"


def _explain(failure: Exception, weights: str) -> str:
    return (
        f"The trained network could not be converted to int8 and written: {failure} "
        f"({type(failure).__name__}). {weights}. To convert again, load them with `load_qat_checkpoint`."
    )
