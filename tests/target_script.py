"""Runs with a target on two gloo processes, each of which writes what it saw: `target_script.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import distributed

from qat_lightning import AccuracyTarget
from tests.target_runs import Faithful, bad, callback, fit, good, kept

DDP: dict[str, Any] = {"strategy": "ddp", "devices": 2, "max_epochs": 1}


def mine() -> Faithful:
    """On rank 1 another network, from which DistributedDataParallel and the target protect the run."""
    return good() if getattr(rank_zero_only, "rank", 0) else bad()


class Loaders(Faithful):
    """Two loaders on rank 0."""

    def val_dataloader(self) -> Any:
        return [self.own] * (2 - self.global_rank)


def failure(folder: Path, module: pl.LightningModule, **options: Any) -> str:
    try:
        fit(folder, module, qat=callback(**options), **DDP)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main(folder: Path) -> None:
    result: dict[str, Any] = {}
    result["failure"] = failure(folder / "failed", mine(), target=AccuracyTarget(0))
    result["error"] = failure(folder / "failed", Loaders(mine().model))
    module = mine()
    fit(folder, module, **DDP)
    resumed = good()
    fit(folder, resumed, ckpt_path=folder / "epoch=0.ckpt", **{**DDP, "max_epochs": 2})
    result |= {"kept": kept(module), "resumed": kept(resumed), "state": resumed.state_dict()}
    torch.save(result, folder / f"rank{distributed.get_rank()}.pt")
    # Together, or gloo aborts the process that is still there when the other one leaves.
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
