"""OmegaConf resolvers for the configuration of `qat-train`: folder names, ranks, launchers.

Each process that torchrun or srun starts composes the configuration by itself, seconds apart. All must get
the same run folder, and only the first process writes to it.
"""

from __future__ import annotations

import os
from datetime import datetime
from functools import cache
from importlib.util import find_spec
from typing import NoReturn

from hydra.core.config_store import ConfigStore
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import OmegaConf
from torch import distributed

from qat_lightning.base.errors import MissingExtraError

_PLUGIN = "hydra_submitit_launcher"


def run_name() -> str:
    """Returns the name of this run's folder, the same in all its processes.

    The name is the start time, under torchrun that of the first process. Under srun it is the number of the
    job and of its step, because a requeued job keeps them.
    """
    if TorchElasticEnvironment.detect():
        return _common_time()
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_JOB_ID" in os.environ:
        step = os.environ.get("SLURM_STEP_ID")
        return f"slurm/{os.environ['SLURM_JOB_ID']}" + (f".{step}" if step else "")
    return _time()


def on_first(value: str) -> str | None:
    """Returns `value` in the first process, and None in all others."""
    return value if getattr(rank_zero_only, "rank", 0) == 0 else None


def tasks(devices: int | str) -> int:
    """Returns how many processes SLURM starts on each machine: one per device."""
    if not str(devices).isdigit() or int(devices) < 1:
        raise ValueError(
            "SLURM needs the number of processes to start on a machine, as in trainer.devices=4, but "
            f"trainer.devices is {devices!r}."
        )
    return int(devices)


def register() -> None:
    """Registers the resolvers with OmegaConf, and the launchers with Hydra."""
    OmegaConf.register_new_resolver("run_name", run_name, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("on_first", on_first, replace=True)
    OmegaConf.register_new_resolver("tasks", tasks, replace=True)
    if not _has_plugin():
        OmegaConf.register_new_resolver("no_launcher", _no_launcher, replace=True)
        for name in ("submitit_slurm", "submitit_local"):
            ConfigStore.instance().store(name, {"_target_": "${no_launcher:}"}, group="hydra/launcher")


def _time() -> str:
    return datetime.now().strftime("%Y-%m-%d/%H-%M-%S")


def _common_time() -> str:
    return _meeting_point().compare_set("qat_lightning/run_name", "", _time()).decode()


@cache  # keeps the store alive, because other processes may still read it
def _meeting_point() -> distributed.Store:
    """Returns the store of torchrun's agents. It exists before the process group."""
    store, _, _ = next(distributed.rendezvous("env://"))
    return store


def _has_plugin() -> bool:
    return find_spec("hydra_plugins") is not None and find_spec(f"hydra_plugins.{_PLUGIN}") is not None


def _no_launcher() -> NoReturn:
    raise MissingExtraError(_PLUGIN, "slurm", "Sending jobs to SLURM")
