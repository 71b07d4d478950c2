"""Trains in float before the run itself, so that one command trains float and then int8.

The float run gets a process of its own, because one process can start the others of only one distributed run.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from qat_lightning.cli.launch import started_together

_WANTED = "float_first.yaml"


def weights_of_float_run(cfg: DictConfig) -> str:
    """Trains `cfg` in float, with the overrides in its `float_first`, in the run's subfolder `float`.

    The other processes of a distributed run start later, and find the float run finished. With `resume=auto`
    an interrupted float run continues, and a finished one does not train again.

    Returns:
        The path of the weights to start from.

    Raises:
        ValueError: torchrun or srun has started all processes of the run together.
        RuntimeError: The float run failed.
    """
    folder = Path(cfg.output_dir).absolute() / "float"
    _check_launcher()
    if getattr(rank_zero_only, "rank", 0) == 0:
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(_float_configuration(cfg, folder), folder / _WANTED, resolve=True)
        command = [sys.executable, "-m", "qat_lightning.cli.float_run", str(folder / _WANTED)]
        done = subprocess.run(command, check=False)
        if done.returncode:
            raise RuntimeError(
                f"The float run in {folder} failed with exit status {done.returncode}. Its own message is "
                "above. With resume=auto and the same output folder, the command continues it."
            )
    return str(folder / "float.pt")


def _float_configuration(cfg: DictConfig, folder: Path) -> DictConfig:
    changed = copy.deepcopy(cfg)
    OmegaConf.set_struct(changed, False)
    changed.merge_with(cfg.float_first)
    changed.output_dir, changed.float_first = str(folder), None
    changed.quantization._target_ = None
    return changed


def _check_launcher() -> None:
    launcher = started_together()
    if launcher is not None:
        raise ValueError(
            f"float_first trains a float run before this one, but {launcher} has started the processes of "
            "this one already. Run the float training by itself (backend=float). Then run this command with "
            "weights=…/float.pt and float_first=null."
        )
