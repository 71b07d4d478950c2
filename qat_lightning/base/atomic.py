"""Writes files so that they are complete or absent, even if the process is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

_SUFFIX = ".partial"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file beside `path`, and moves it to `path` at the end of the block.

    If the block raises, `path` stays as it was and the temporary file is removed. A killed process may leave
    a hidden `.name.….partial` behind. Nothing reads it, and :func:`remove_partial` removes it.

    Args:
        path: The file to write. Its folder is created if needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}{_SUFFIX}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # otherwise a power failure may leave the name without the content
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """Creates `folder` if needed. Raises an `OSError` if no file can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe.{uuid4().hex[:8]}{_SUFFIX}"
    probe.touch()
    probe.unlink()


def remove_partial(folder: Path) -> None:
    """Removes the temporary files that killed processes left in `folder`."""
    for partial in folder.glob(f".*{_SUFFIX}"):
        partial.unlink(missing_ok=True)
