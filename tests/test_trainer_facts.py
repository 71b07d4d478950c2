"""Fractions of a run, whatever a step is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

from qat_lightning import QuantizationAwareTraining
from tests.runs import TinyModule, loader, trainer


class TwoOptimizers(TinyModule):
    """Steps two optimizers in each batch, by hand, so that global_step counts two."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        return [torch.optim.SGD(parameters[:2], lr=0.01), torch.optim.SGD(parameters[2:], lr=0.01)]


class Watch(pl.Callback):
    """Remembers the batch, counted over the run, in which observers were first off."""

    def __init__(self, qat: QuantizationAwareTraining) -> None:
        self.qat, self.batches, self.frozen_at = qat, 0, -1

    def on_train_batch_end(self, *_: Any) -> None:
        phase = self.qat._phases._phase
        if phase is not None and not phase.observe and self.frozen_at < 0:
            self.frozen_at = self.batches
        self.batches += 1


@pytest.mark.parametrize(
    ("module", "options", "expected"),
    [
        (TinyModule, {"max_epochs": 4}, 12),
        (TinyModule, {"max_epochs": -1, "max_steps": 20}, 10),
        (TinyModule, {"max_epochs": 4, "accumulate_grad_batches": 2}, 12),
        (TinyModule, {"max_epochs": 4, "limit_train_batches": 3}, 6),
        (TwoOptimizers, {"max_epochs": 4}, 12),
    ],
)
def test_half_of_the_run_is_half_of_its_batches(
    tmp_path: Path, module: type[TinyModule], options: dict[str, Any], expected: int
) -> None:
    qat = QuantizationAwareTraining(freeze_observers_at=0.5)
    watch = Watch(qat)
    trainer(tmp_path, qat, watch, **options).fit(module(), loader(), loader(16, seed=1))
    assert watch.frozen_at == expected
    assert qat.int8_module is not None
