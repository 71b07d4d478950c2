"""Locks run folders, so that each has one writer even if a process outlives its killed launcher."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lightning.pytorch.utilities.rank_zero import rank_zero_only


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Locks a run folder inside the block, in the first process. The lock ends with the process.

    Raises:
        RuntimeError: Another process has locked the folder.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        _lock(file, folder)
        yield


def _lock(file: IO[str], folder: Path) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise RuntimeError(
            f"Another process is still writing to {folder}: the same command, or a process that outlived its "
            "killed launcher. Wait until it ends, end it, or choose another output folder."
        ) from error
    except OSError:
        pass  # a file system without locks
