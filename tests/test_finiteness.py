"""A NaN in training is found, named, and never reaches a range or a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from qat_lightning import ConversionError, QuantizationAwareTraining, convert, prepare
from qat_lightning.quantize.nonfinite import first_nonfinite
from tests.networks import CASES, Case, train_steps
from tests.runs import TinyModule, trainer


class Poisoned(nn.Module):
    """A branch gives NaN from its third batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 4)
        self.poison = Poison()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.poison(self.first(x))).mean((2, 3)))


class Poison(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return x / 0.0 if self.calls > 2 else x


def poisoned_run(folder: Path, **options: Any) -> tuple[pl.LightningModule, str]:
    module = TinyModule(Poisoned())
    qat = QuantizationAwareTraining(keep_float=["poison"], mode="fx")
    with pytest.raises(FloatingPointError) as caught:
        trainer(folder, qat, max_epochs=2, limit_val_batches=0, **options).fit(module)
    return module, str(caught.value)


def test_the_first_tensor_in_execution_order_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qat_lightning.modes.trace.tracing.reads_training", lambda m: isinstance(m, Poison))
    module, message = poisoned_run(tmp_path)
    assert "the output of 'poison'" in message
    assert "step 2" in message
    assert "gradient_clip_val" in message
    module.model.poison.calls = -1000  # type: ignore[union-attr, operator]
    trainer(tmp_path, QuantizationAwareTraining(mode="fx"), max_epochs=1, limit_val_batches=0).fit(module)
    for name, value in module.state_dict().items():
        if name.endswith(("min_val", "max_val", ".scale")) and "weight" not in name:
            assert torch.isfinite(value).all(), name


def test_no_checkpoint_is_written_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat_lightning.modes.trace.tracing.reads_training", lambda m: isinstance(m, Poison))
    monkeypatch.setattr(QuantizationAwareTraining, "on_before_optimizer_step", lambda *_: None)
    poisoned_run(tmp_path)
    assert not list(tmp_path.rglob("*.ckpt"))


class NaNLoss(TinyModule):
    """Its loss is a NaN from a step on, after which observers of activations are frozen."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.global_step >= self.step else loss


def test_a_weight_without_a_number_is_found_a_step_later(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(freeze_observers_at=1)
    with pytest.raises(FloatingPointError, match=r"appeared in the weight of 'stem.*at or before step 7"):
        trainer(tmp_path, qat, max_epochs=2, limit_val_batches=0).fit(NaNLoss(6))


def test_weights_without_a_number_get_no_checkpoint_and_no_int8(tmp_path: Path) -> None:
    module, qat = NaNLoss(11), QuantizationAwareTraining(freeze_observers_at=1)  # the last step
    with pytest.raises(FloatingPointError, match=r"holds a NaN or an infinity at step 12, so no checkpoint"):
        trainer(tmp_path, qat, max_epochs=2, limit_val_batches=0).fit(module)
    assert qat.int8_module is None
    with pytest.raises(ConversionError, match=r"'model\.stem.*' holds a NaN|'stem.*' holds a NaN"):
        convert(module)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_healthy_network_has_none(case: Case) -> None:
    prepared = prepare(case.build(), mode=case.mode)
    train_steps(prepared, case.inputs())
    assert first_nonfinite(prepared) is None


def test_a_poisoned_weight_is_named() -> None:
    prepared: Any = prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))).train()
    with torch.no_grad():
        prepared.get_submodule("2").weight[0, 0, 0, 0] = torch.nan
    prepared(torch.randn(2, 3, 8, 8))
    assert first_nonfinite(prepared) == "the weight of '2'"
