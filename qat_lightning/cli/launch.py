"""Lets Lightning start the other processes of a job under Hydra, in a sweep and without one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from omegaconf import read_write


@contextmanager
def one_job() -> Iterator[None]:
    """Restores the process after a job, so that the next job of a sweep can start.

    Lightning starts the other processes by running the command line again, and marks the first process in its
    environment. In a sweep, that command line would sweep again, and the marks would make the next job wait
    for processes that nobody starts.
    """
    environment, arguments, threads = dict(os.environ), list(sys.argv), torch.get_num_threads()
    main = sys.modules["__main__"]
    spec = main.__spec__
    if HydraConfig.initialized():
        _describe_job()
    try:
        yield
    finally:
        leave_process_group()
        os.environ.clear()
        os.environ.update(environment)
        sys.argv[:] = arguments
        main.__spec__ = spec
        torch.set_num_threads(threads)


def pass_on(**fields: str | None) -> None:
    """Sets fields on the command line of the other processes."""
    kept = [each for each in sys.argv[1:] if each.partition("=")[0].lstrip("+") not in fields]
    sys.argv[1:] = [*kept, *(f"{name}={_quoted(value)}" for name, value in fields.items())]


def leave_process_group() -> None:
    """Leaves the process group of the job, if there is one. Metrics are no longer gathered afterwards."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def started_together() -> str | None:
    """Returns `"torchrun"` or `"srun"` if it started several processes of this job, else None."""
    if TorchElasticEnvironment.detect() and int(os.environ["WORLD_SIZE"]) > 1:
        return "torchrun"
    if "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return "srun"
    return None


def _describe_job() -> None:
    """Gives the other processes the command line and the run folder of this job."""
    hydra = HydraConfig.get()
    with read_write(hydra):  # type: ignore[arg-type]
        hydra.run.dir = hydra.runtime.output_dir
    if hydra.mode != RunMode.MULTIRUN:
        return
    _check_sweep()
    flags = [each for each in sys.argv[1:] if not _is_sweep(each)]
    if "SUBMITIT_EXECUTOR" in os.environ:  # submitit's command line runs one pickled job
        sys.modules["__main__"].__spec__ = find_spec("qat_lightning.__main__")
        flags = []
    sys.argv[1:] = [*flags, *hydra.overrides.task]


def _check_sweep() -> None:
    """Raises if the processes could form a group only for the first job of a sweep."""
    launcher = started_together()
    if launcher is None or (launcher == "srun" and "SUBMITIT_EXECUTOR" in os.environ):
        return
    raise ValueError(
        f"Each job of a sweep (-m) needs new processes, but {launcher} has started these once. Start "
        f"qat-train -m without {launcher}, so that it starts the processes of each job, or send each job to "
        "SLURM with hydra/launcher=slurm."
    )


def _is_sweep(argument: str) -> bool:
    override = not argument.startswith("-") and ("=" in argument or argument.startswith("~"))
    return override or argument in ("-m", "--multirun")


def _quoted(value: str | None) -> str:
    """Quotes a value so that Hydra reads it back."""
    return "null" if value is None else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
