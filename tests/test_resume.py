"""A run that crashes and is resumed ends where the uninterrupted one does, bit for bit."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from qat_lightning import QuantizationAwareTraining, RecipeMismatchError
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from tests.networks import Residual, Stubbed, same_state
from tests.runs import TinyModule, dataset, loader, trainer

# A resumed run writes beside the first one's checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")

EPOCHS = 4
STEPS = 6
FREEZES = {"freeze_observers_at": 0.6, "freeze_bn_at": 3}


class Crash(RuntimeError):
    pass


class CrashAt(pl.Callback):
    """Raises at a training batch, counted over the run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Crash


class Noisy(TinyModule):
    """Draws from every generator in training: dropout, noise from NumPy and from Python."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = float(np.random.rand()) + random.random()
        return super().training_step((batch[0] + 0.1 * noise, batch[1]), batch_idx)


class OneCycle(Noisy):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        total = int(self.trainer.estimated_stepping_batches)
        schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Augmented(torch.utils.data.Dataset[Any]):
    """Draws noise from the workers' own generators."""

    def __init__(self) -> None:
        self.inner = dataset()

    def __getitem__(self, index: int) -> Any:
        x, y = self.inner[index]
        return x + 0.1 * torch.randn_like(x), y

    def __len__(self) -> int:
        return len(self.inner)


class Workers(Noisy):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Augmented(), batch_size=8, shuffle=True, num_workers=2)


CHECKPOINTS: dict[str, Callable[[Path], ModelCheckpoint]] = {
    "validation_end": lambda d: ModelCheckpoint(d, monitor="val_loss", save_top_k=-1, filename="{epoch}"),
    "train_epoch_end": lambda d: ModelCheckpoint(
        d, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True
    ),
    "save_last": lambda d: ModelCheckpoint(d, save_last=True, filename="other"),
}


def seed() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)


def run(
    folder: Path,
    module: pl.LightningModule,
    checkpoint: ModelCheckpoint,
    *extra: pl.Callback,
    ckpt_path: Path | None = None,
    schedule: dict[str, Any] | None = None,
    **options: Any,
) -> QuantizationAwareTraining:
    qat = QuantizationAwareTraining(convert="last", **(FREEZES if schedule is None else schedule))
    runner = trainer(folder, qat, checkpoint, *extra, **{"max_epochs": EPOCHS, **options})
    runner.fit(module, ckpt_path=ckpt_path)
    return qat


def interrupted(
    folder: Path,
    build: Callable[[], pl.LightningModule],
    make_checkpoint: Callable[[Path], ModelCheckpoint],
    name: str,
    **options: Any,
) -> tuple[pl.LightningModule, QuantizationAwareTraining]:
    """Crashes in the third epoch and resumes from the end of the second."""
    seed()
    with pytest.raises(Crash):
        run(folder, build(), make_checkpoint(folder / "ckpt"), CrashAt(2 * STEPS + 2), **options)
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    resumed = build()
    qat = run(folder, resumed, make_checkpoint(folder / "ckpt"), ckpt_path=folder / "ckpt" / name, **options)
    return resumed, qat


def assert_equal(
    one: pl.LightningModule,
    other: pl.LightningModule,
    first: QuantizationAwareTraining,
    second: QuantizationAwareTraining,
) -> None:
    assert same_state(one, other) == []
    assert same_state(dict(one.named_buffers()), dict(other.named_buffers())) == []
    assert first.int8_module is not None
    assert second.int8_module is not None
    x = dataset(32, seed=2).tensors[0]
    assert torch.equal(first.int8_module(x), second.int8_module(x))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("network", [Residual, Stubbed])
def test_resume_is_exact(tmp_path: Path, checkpoint: str, network: type[nn.Module]) -> None:
    make = CHECKPOINTS[checkpoint]
    name = "last.ckpt" if checkpoint == "save_last" else "epoch=1.ckpt"

    def build() -> pl.LightningModule:
        return Noisy(network())

    seed()
    whole = build()
    qat = run(tmp_path / "whole", whole, make(tmp_path / "whole" / "ckpt"))
    resumed, again = interrupted(tmp_path / "crashed", build, make, name)
    assert_equal(whole, resumed, qat, again)


@pytest.mark.parametrize("kind", [OneCycle, Workers])
def test_resume_is_exact_with(tmp_path: Path, kind: type[TinyModule]) -> None:
    make = CHECKPOINTS["validation_end"]
    seed()
    whole = kind()
    qat = run(tmp_path / "whole", whole, make(tmp_path / "whole" / "ckpt"))
    resumed, again = interrupted(tmp_path / "crashed", kind, make, "epoch=1.ckpt")
    assert_equal(whole, resumed, qat, again)


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"num_sanity_val_steps": 0}])
def test_resume_is_exact_with_trainer_options(tmp_path: Path, options: dict[str, Any]) -> None:
    make = CHECKPOINTS["validation_end"]
    accumulate = options.get("accumulate_grad_batches", 1)
    seed()
    whole = Noisy()
    qat = run(tmp_path / "whole", whole, make(tmp_path / "whole" / "ckpt"), **options)
    seed()
    crash = CrashAt((2 * STEPS + 2) // accumulate)
    with pytest.raises(Crash):
        run(tmp_path, Noisy(), make(tmp_path / "ckpt"), crash, **options)
    resumed = Noisy()
    again = run(
        tmp_path, resumed, make(tmp_path / "ckpt"), ckpt_path=tmp_path / "ckpt/epoch=1.ckpt", **options
    )
    assert_equal(whole, resumed, qat, again)


def test_freezes_stay_frozen_after_a_resume(tmp_path: Path) -> None:
    class Flags(pl.Callback):
        seen: list[tuple[bool, bool]]

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            children = fake_quantizes(pl_module)
            observe = {bool(child.observer_enabled) for name, child in children if "weight" not in name}
            frozen = {not m.training for m in pl_module.modules() if isinstance(m, nn.BatchNorm2d)}
            self.seen.append((observe.pop(), frozen.pop()))

    flags = Flags()
    flags.seen = []
    make = CHECKPOINTS["validation_end"]
    schedule = {"freeze_observers_at": 1, "freeze_bn_at": 0.25}
    run(tmp_path, Noisy(), make(tmp_path / "ckpt"), schedule=schedule, max_epochs=2)
    path = tmp_path / "ckpt/epoch=1.ckpt"
    run(tmp_path, Noisy(), make(tmp_path / "ckpt"), flags, schedule=schedule, ckpt_path=path)
    assert flags.seen == [(False, True)] * 2 * STEPS


def test_a_resume_with_another_length_keeps_the_resolved_steps(tmp_path: Path) -> None:
    class Steps(QuantizationAwareTraining):
        def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert self._phases._resolved is not None
            self.step = self._phases._resolved.freeze_observers.step

    make = CHECKPOINTS["validation_end"]
    first, second = Steps(freeze_observers_at=0.5), Steps(freeze_observers_at=0.5)
    checkpoints = make(tmp_path)
    trainer(tmp_path, first, checkpoints, max_epochs=2).fit(Noisy())
    trainer(tmp_path, second, checkpoints, max_epochs=8).fit(Noisy(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert (first.step, second.step) == (STEPS, STEPS)


def test_a_mid_epoch_resume_warns_once(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    trainer(tmp_path, QuantizationAwareTraining(), checkpoint, max_epochs=1).fit(Noisy())
    runner = trainer(tmp_path, QuantizationAwareTraining(), checkpoint, max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner.fit(Noisy(), ckpt_path=tmp_path / "ckpt/step=4.ckpt")
    about = [w for w in caught if "your dataloader is not resumable" in str(w.message)]
    assert len(about) == 1
    assert runner.global_step == 2 * STEPS


def test_an_epoch_end_resume_does_not_warn(tmp_path: Path) -> None:
    make = CHECKPOINTS["validation_end"]
    run(tmp_path, Noisy(), make(tmp_path), schedule={}, max_epochs=1)
    path = tmp_path / "epoch=0.ckpt"
    run(tmp_path, Noisy(), make(tmp_path), schedule={}, max_epochs=2, ckpt_path=path)  # warnings are errors


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        (
            {"backend": "qnnpack"},
            r"fake-quantizes differ, the first being '.*': .*255.* in the network and .*127.* in the state",
        ),
        (
            {"keep_float": ["fc"]},
            r"the quantized layers differ: only the network has \[\], only the state dict has \['fc'\]",
        ),
        ({"replace_relu6": False}, "fake-quantizes differ: only the network has"),
    ],
)
def test_a_checkpoint_of_another_recipe(tmp_path: Path, settings: dict[str, Any], difference: str) -> None:
    path = _checkpoint(tmp_path, QuantizationAwareTraining())
    other = trainer(tmp_path, QuantizationAwareTraining(**settings), max_epochs=2, enable_checkpointing=False)
    with pytest.raises(RecipeMismatchError, match=rf"network 'model' is prepared with: .*{difference}"):
        other.fit(TinyModule(), ckpt_path=path)


def test_a_float_checkpoint(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path)
    runner = trainer(tmp_path, QuantizationAwareTraining(), max_epochs=2, enable_checkpointing=False)
    with pytest.raises(
        RecipeMismatchError, match=r"'model' is prepared.*: a float checkpoint\. Load float weights"
    ):
        runner.fit(TinyModule(), ckpt_path=path)


def test_the_schedule_is_no_part_of_the_comparison(tmp_path: Path) -> None:
    make = CHECKPOINTS["validation_end"]
    run(tmp_path, TinyModule(), make(tmp_path), schedule={}, max_epochs=1)
    other = {"freeze_observers_at": None, "freeze_bn_at": 1}
    path = tmp_path / "epoch=0.ckpt"
    with pytest.warns(UserWarning, match="has no effect"):
        qat = run(tmp_path, TinyModule(), make(tmp_path), schedule=other, max_epochs=2, ckpt_path=path)
    assert qat.int8_module is not None
    assert qat.int8_module(loader().dataset[0][0][None]).shape == (1, 4)


def _checkpoint(folder: Path, *callbacks: pl.Callback) -> Path:
    checkpoint = ModelCheckpoint(folder / "ckpt", filename="one")
    trainer(folder, *callbacks, checkpoint, max_epochs=1).fit(TinyModule())
    return folder / "ckpt/one.ckpt"
