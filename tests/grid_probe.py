"""A callback for runs on the command line: every rank writes the grids that it ended with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from qat_lightning.fake_quant.fake_quantize import fake_quantizes


class GridProbe(pl.Callback):
    """Writes `grid<rank>.pt` into `folder` at the end of fit.

    Args:
        folder: An existing folder.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        grids = {}
        grid: Any
        for name, grid in fake_quantizes(pl_module):
            grids[name] = torch.stack([grid.scale.flatten(), grid.zero_point.flatten().float()])
        torch.save(grids, self.folder / f"grid{trainer.global_rank}.pt")
