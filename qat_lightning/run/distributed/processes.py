"""Makes the processes of a distributed run fail together, and gathers values from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from qat_lightning.base.errors import RankError


def several_processes() -> bool:
    """Returns whether this process is one of several in a process group."""
    initialized = distributed.is_available() and distributed.is_initialized()
    return initialized and distributed.get_world_size() > 1


def gather(value: Any) -> list[Any]:
    """Returns the `value` of every rank, in rank order."""
    values: list[Any] = [value]
    if several_processes():
        values = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value)
    return values


@contextmanager
def fail_together(doing: str) -> Iterator[None]:
    """Raises an error on every rank if the block raises one on any rank.

    Every rank must enter the block, and the block must not wait for other ranks itself.

    Args:
        doing: What the block does, for the message: `"preparing the networks"`.

    Raises:
        RankError: The block failed on another rank, but not on this one.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failures = gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, message in enumerate(failures):
        if message is not None:
            raise RankError(f"Rank {rank} failed while {doing}, so the run cannot continue. {message}")
