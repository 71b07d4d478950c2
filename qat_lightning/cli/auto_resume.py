"""`resume=auto`: finds the interrupted run of the same configuration, and its last usable checkpoint."""

from __future__ import annotations

import copy
import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from omegaconf import DictConfig, OmegaConf, read_write
from torch import distributed

from qat_lightning.base.atomic import remove_partial, replacing
from qat_lightning.cli.hydra_internals import unresolved
from qat_lightning.run.checkpoints import checkpoints_in, newest_usable

CONFIG, METRICS = "config.yaml", "metrics.json"

# The fields that may differ between two starts of one run.
_START = ("output_dir", "resume", "ckpt_path", "report", "post_training", "float_first")
_TIME = "any-time"


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        folder: Its output folder.
        checkpoint: The checkpoint to continue from, or None to start at the beginning.
        metrics: The results of the run if it is finished, else None.
    """

    folder: Path
    checkpoint: str | None = None
    metrics: dict[str, Any] | None = None


def find_start(cfg: DictConfig) -> Start:
    """Finds where the run of `cfg` starts, and logs it in one line.

    With `resume=auto` it searches the output folder. If Hydra puts the time into the folder's name, it also
    searches the folders of other times. It takes the newest folder with the same configuration.

    Args:
        cfg: The configuration that was composed from `train.yaml`.

    Raises:
        ValueError: `resume` is neither null nor auto, `ckpt_path` is given too, or the output folder holds
            checkpoints of another configuration.
    """
    folder = Path(cfg.output_dir).absolute()
    _check(cfg)
    if cfg.resume is None or cfg.preflight == "only":
        return Start(folder, cfg.ckpt_path)
    configuration = _configuration(OmegaConf.to_container(cfg, resolve=True))
    _refuse_another_run(folder, configuration)
    for each in _newest_first({folder, *_folders_of_other_times(folder)}):
        if _saved_configuration(each) != configuration:
            continue
        written = _checkpoints(each)
        if _is_finished(each, written):
            rank_zero_info(f"resume=auto: {each} is finished, so it does not train again: its results follow")
            return Start(each, None, json.loads((each / METRICS).read_text()))
        checkpoint = newest_usable(written)
        if checkpoint is not None:
            rank_zero_info(f"resume=auto: continuing from {checkpoint}")
            return Start(each, checkpoint)
    rank_zero_info(
        "resume=auto: found no checkpoint of this configuration, so the run starts from the beginning"
    )
    return Start(folder)


def save_config(cfg: DictConfig, start: Start) -> None:
    """Writes the configuration of a run that starts, and removes the results of the run that it replaces.

    If the run continues, the file keeps its time. Checkpoints that are older than it belong to another run.
    """
    path = start.folder / CONFIG
    since = None
    if start.checkpoint is not None and start.folder in Path(start.checkpoint).absolute().parents:
        since = (path if path.is_file() else Path(start.checkpoint)).stat().st_mtime_ns
    with replacing(path) as partial:
        OmegaConf.save(cfg, partial, resolve=True)
        if since is not None:
            os.utime(partial, ns=(since, since))
    (start.folder / METRICS).unlink(missing_ok=True)
    remove_partial(start.folder)


class SameStart(pl.Callback):
    """Raises on every process of a distributed run if they start from different checkpoints.

    Args:
        start: Where this process starts.
    """

    def __init__(self, start: Start) -> None:
        self.start = start

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compares the checkpoints of all processes."""
        if trainer.world_size == 1:
            return
        found: list[str | None] = [None] * trainer.world_size
        distributed.all_gather_object(found, self.start.checkpoint)
        if len(set(found)) > 1:
            raise RuntimeError(
                "All processes of a run must start from one checkpoint, but the ranks found different ones: "
                f"{found}. Put the run folder on a file system that all processes share."
            )


def _check(cfg: DictConfig) -> None:
    if cfg.resume not in (None, "auto"):
        raise ValueError(
            f"resume must be auto or null, but received {cfg.resume!r}. To continue from a checkpoint of "
            "your choice, pass ckpt_path=…"
        )
    if cfg.resume is not None and cfg.ckpt_path is not None:
        raise ValueError(
            f"resume=auto finds the checkpoint itself, but ckpt_path={cfg.ckpt_path} names one, too. Pass "
            "only one of the two."
        )


def _configuration(container: Any) -> Any:
    """Returns the identity of a run: its resolved configuration, without folders and start options."""
    folder = str(container["output_dir"])

    def without_folder(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: without_folder(value) for key, value in node.items()}
        if isinstance(node, list):
            return [without_folder(value) for value in node]
        return node.replace(folder, "output_dir") if isinstance(node, str) else node

    return without_folder({key: value for key, value in container.items() if key not in _START})


def _saved_configuration(folder: Path) -> Any:
    try:
        return _configuration(OmegaConf.to_container(OmegaConf.load(folder / CONFIG)))
    except (OSError, KeyError, TypeError, ValueError):  # there is none, or it belongs to something else
        return None


def _refuse_another_run(folder: Path, configuration: dict[str, Any]) -> None:
    saved = _saved_configuration(folder)
    if saved is None or not _checkpoints(folder):
        return
    ours, theirs = dict(_leaves(configuration)), dict(_leaves(saved))
    differences = [
        f"{key} is {theirs.get(key)!r} in the folder, but {ours.get(key)!r} in this run"
        for key in sorted(ours.keys() | theirs.keys(), key=lambda key: (key.count("."), key))
        if ours.get(key) != theirs.get(key)
    ]
    if differences:
        raise ValueError(
            f"{folder} holds checkpoints of another configuration: {'; '.join(differences[:4])}. Pass the "
            "same configuration or another output folder, or name the checkpoint with ckpt_path=…"
        )


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(node, dict):
        yield name.removesuffix("."), node
        return
    for key, value in node.items():
        yield from _leaves(value, f"{name}{key}.")


def _folders_of_other_times(folder: Path) -> Iterator[Path]:
    """Yields the run folders that Hydra gave this job at other times."""
    if not HydraConfig.initialized() or Path(HydraConfig.get().runtime.output_dir) != folder:
        return
    cfg: Any = copy.deepcopy(HydraConfig.instance().cfg)
    hydra = cfg.hydra
    with read_write(hydra):
        for group, key in (("run", "dir"), ("sweep", "dir"), ("sweep", "subdir")):
            raw = unresolved(hydra[group], key)
            raw = re.sub(r"\$\{run_name:\}", f"{_TIME}/{_TIME}", str(raw))
            hydra[group][key] = re.sub(r"\$\{now:[^}]*\}", _TIME, raw)
    path = hydra.run.dir
    if hydra.mode == RunMode.MULTIRUN:
        path = str(Path(hydra.sweep.dir) / hydra.sweep.subdir)
    if _TIME in path:
        whole = Path(hydra.runtime.cwd) / path
        pattern = glob.escape(str(whole.relative_to(whole.anchor))).replace(_TIME, "*")
        yield from Path(whole.anchor).glob(pattern)


def _newest_first(folders: set[Path]) -> list[Path]:
    def written(folder: Path) -> int:
        files = [*checkpoints_in(folder), folder / METRICS]
        return max((file.stat().st_mtime_ns for file in files if file.is_file()), default=0)

    return sorted(folders, key=written, reverse=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, newest first, without those of an earlier run."""
    started = (folder / CONFIG).stat().st_mtime_ns
    return [path for path in checkpoints_in(folder) if path.stat().st_mtime_ns >= started]


def _is_finished(folder: Path, checkpoints: list[Path]) -> bool:
    metrics = folder / METRICS
    if not metrics.is_file():
        return False
    times = [path.stat().st_mtime_ns for path in [folder / CONFIG, *checkpoints]]
    return metrics.stat().st_mtime_ns >= max(times)
