"""`latest_checkpoint`: finds the newest complete checkpoint from which a run resumes exactly."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from qat_lightning.run.progress import has_begun, is_between_steps


def latest_checkpoint(folder: str | Path, *, weights_only: bool = True) -> str | None:
    """Finds the checkpoint to pass as `trainer.fit(ckpt_path=…)` after an interruption.

    This is the most recently written checkpoint in `folder` and its subfolders. Files that are damaged,
    incomplete or hold only weights are skipped, and a log line says why. A checkpoint from the middle of a
    training step (by OnExceptionCheckpoint) does not resume exactly, so it is used only if there is no other.

    Args:
        folder: Where the run writes its checkpoints. It need not exist.
        weights_only: As for `trainer.fit`. False also reads checkpoints whose hyperparameters are objects,
            and runs the code in them.

    Returns:
        The path, or None if there is no usable checkpoint. The run then starts from the beginning.

    Example::

        trainer.fit(module, ckpt_path=latest_checkpoint("checkpoints"))
    """
    return newest_usable(checkpoints_in(Path(folder)), weights_only=weights_only)


def checkpoints_in(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder and its subfolders, newest first."""
    return sorted((p for p in folder.rglob("*.ckpt") if p.is_file()), key=_written, reverse=True)


def newest_usable(paths: Iterable[Path], *, weights_only: bool = True) -> str | None:
    """Returns the first of `paths` that resumes exactly, else the first that resumes at all."""
    inexact = None
    for path in paths:
        try:
            if is_between_steps(_read(path, weights_only)):
                return str(path)
            inexact = inexact or str(path)
            raise _Unusable(
                "it was written in the middle of a training step, so a run would not resume exactly"
            )
        except _Unusable as reason:
            rank_zero_info(f"Skipping the checkpoint {path}: {reason}")
    if inexact is not None:
        rank_zero_info(f"Using {inexact} anyway, since no checkpoint resumes exactly")
    return inexact


class _Unusable(Exception):
    """The reason why a run cannot resume from a file."""


def _read(path: Path, weights_only: bool) -> dict[str, Any]:
    try:
        # mmap keeps this cheap for large files. It still fails for a truncated one: the index is at the end.
        content = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError) as error:
        if weights_only and zipfile.is_zipfile(path):
            raise _Unusable(
                "it holds objects. weights_only=False would read them, and run their code"
            ) from error
        raise _Unusable("it is damaged or incomplete") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise _Unusable("it is not a Lightning checkpoint")
    missing = [key for key in ("loops", "optimizer_states", "lr_schedulers") if key not in content]
    if missing:
        raise _Unusable(f"it holds only weights: {', '.join(missing)} are missing")
    try:
        begun = has_begun(content)
    except (KeyError, TypeError) as error:
        raise _Unusable("its loop counters are from an incompatible version of Lightning") from error
    if not begun:
        raise _Unusable("it was written before the first step")
    return content


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns
