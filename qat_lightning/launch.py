"""Lets Lightning start a job's further processes from Hydra, in a sweep as well as alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import read_write


@contextmanager
def one_job() -> Iterator[None]:
    """Leaves the process as it was before the job, so that the next one of a sweep can start.

    Lightning starts further processes by running the command line again and marks the first one in
    its environment. In a sweep that command line would sweep again, and the marks would make the
    next job wait for processes that nobody starts.
    """
    environment, arguments, threads = dict(os.environ), list(sys.argv), torch.get_num_threads()
    if HydraConfig.initialized():
        _describe_job()
    try:
        yield
    finally:
        leave_process_group()
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[:] = arguments
        torch.set_num_threads(threads)


def pass_on(**fields: str | None) -> None:
    """Makes the command line, which further processes get, give these values to these fields."""
    kept = [each for each in sys.argv[1:] if each.partition("=")[0].lstrip("+") not in fields]
    sys.argv[1:] = [*kept, *(f"{name}={_quoted(value)}" for name, value in fields.items())]


def leave_process_group() -> None:
    """Ends communication with the other processes of the job, if there are any.

    From then on metrics are not gathered over processes.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _describe_job() -> None:
    """Makes command line and run folder, which further processes get, those of this very job."""
    hydra = HydraConfig.get()
    with read_write(hydra):  # type: ignore[arg-type]
        hydra.run.dir = hydra.runtime.output_dir
    if hydra.mode == RunMode.MULTIRUN:
        flags = [each for each in sys.argv[1:] if not _is_sweep(each)]
        sys.argv[1:] = [*flags, *hydra.overrides.task]


def _is_sweep(argument: str) -> bool:
    override = not argument.startswith("-") and ("=" in argument or argument.startswith("~"))
    return override or argument in ("-m", "--multirun")


def _quoted(value: str | None) -> str:
    """A value as Hydra reads it back."""
    return "null" if value is None else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
