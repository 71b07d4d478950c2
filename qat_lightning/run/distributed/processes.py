"""Lets the processes of a distributed run succeed or fail together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from qat_lightning.base.errors import RankError


def several_processes() -> bool:
    """Whether this process is one of several in a process group."""
    running = distributed.is_available() and distributed.is_initialized()
    return running and distributed.get_world_size() > 1


def gather(value: Any) -> list[Any]:
    """Returns the `value` of every rank, in rank order."""
    values: list[Any] = [value]
    if several_processes():
        values = [None] * distributed.get_world_size()
        distributed.all_gather_object(values, value)
    return values


@contextmanager
def fail_together(doing: str) -> Iterator[None]:
    """Raises on every rank if the block raises on any rank.

    Every rank must come here, and the block must not wait for other ranks itself.

    Args:
        doing: What the block does, in words: `"preparing the networks"`.

    Raises:
        RankError: Another rank failed, and this one did not.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    reports = gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, report in enumerate(reports):
        if report is not None:
            raise RankError(f"Rank {rank} failed while {doing}, so that the run cannot go on. {report}")
