"""The blocks of both networks, and their optimizer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR


def conv(inputs: int, outputs: int, stride: int | tuple[int, int] = 1) -> nn.Sequential:
    """A convolution of 3x3 with batch-norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def falling_rate(module: LightningModule) -> dict[str, Any]:
    """Returns AdamW, with a schedule from `module.lr` down to zero at the end of the run."""
    optimizer = AdamW(module.parameters(), lr=float(module.lr))  # type: ignore[arg-type]
    falling = CosineAnnealingLR(optimizer, int(module.trainer.estimated_stepping_batches))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}
