"""The life of a run: what the callback prepares, freezes and leaves alone, and when."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from torch import nn

from qat_lightning import QuantizationAwareTraining
from qat_lightning.base.schedule import Phase
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from qat_lightning.quantize.recipe import quantized_networks, recipe_of
from tests.networks import Residual, Stubbed, same_state
from tests.runs import TinyModule, loader, trainer

STEPS = 6  # of an epoch


class Spy(pl.Callback):
    """Remembers, at each training batch, what the fake-quantizes and batch-norms are doing."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Phase]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        children = [child for _, child in fake_quantizes(pl_module)]
        activations = [child for name, child in fake_quantizes(pl_module) if "weight" not in name]
        observe = {bool(child.observer_enabled.item()) for child in activations}
        fake_quant = {bool(child.fake_quant_enabled.item()) for child in children}
        frozen = {not m.training for m in pl_module.modules() if isinstance(m, nn.BatchNorm2d)}
        assert len(observe) == len(fake_quant) == len(frozen) == 1
        self.seen.append((trainer.global_step - 1, Phase(fake_quant.pop(), observe.pop(), frozen.pop())))


class Order(QuantizationAwareTraining):
    """Notes what exists when it prepares and when it converts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.notes: list[str] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        prepared = [name for name, _, _ in quantized_networks(pl_module)]
        self.notes.append(f"setup: {prepared}, {len(trainer.optimizers)} optimizers")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        trained = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
        self.notes.append(f"fit start: trains all {trained == {id(p) for p in pl_module.parameters()}}")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.notes.append(f"fit end: int8 {self.int8_module is not None}")
        super().on_fit_end(trainer, pl_module)
        self.notes.append(f"after: int8 {self.int8_module is not None}")


def test_it_prepares_before_the_optimizers_and_converts_at_the_end(tmp_path: Path) -> None:
    qat = Order()
    trainer(tmp_path, qat, max_epochs=1).fit(TinyModule())
    assert qat.notes == [
        "setup: ['model'], 0 optimizers",
        "fit start: trains all True",
        "fit end: int8 False",
        "after: int8 True",
    ]


@pytest.mark.parametrize("network", [Residual, Stubbed])
def test_freezes_happen_when_asked(tmp_path: Path, network: type[nn.Module]) -> None:
    spy = Spy()
    qat = QuantizationAwareTraining(freeze_bn_at=2, freeze_observers_at=0.75, fake_quant_from=1)
    trainer(tmp_path, qat, spy, max_epochs=4).fit(TinyModule(network()))
    assert spy.seen == [
        (step, Phase(fake_quant=step >= STEPS, observe=step < 18, freeze_bn=step >= 2 * STEPS))
        for step in range(4 * STEPS)
    ]


def test_frozen_statistics_and_ranges_do_not_move(tmp_path: Path) -> None:
    class Snapshots(pl.Callback):
        def __init__(self) -> None:
            self.states: list[dict[str, Any]] = []

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            buffers = pl_module.named_buffers()
            own = ("num_batches", "weight_fake_quant")  # counted on, and following the weight
            self.states.append({n: b.clone() for n, b in buffers if not any(part in n for part in own)})

    snapshots = Snapshots()
    qat = QuantizationAwareTraining(freeze_bn_at=2, freeze_observers_at=2)
    trainer(tmp_path, qat, snapshots, max_epochs=4).fit(TinyModule())
    first, second, third, fourth = snapshots.states
    moved = same_state(first, second)
    assert any(name.endswith("running_mean") for name in moved)
    assert any(name.endswith("activation_post_process.max_val") for name in moved)
    grid = [n for n in second if n.endswith(("running_mean", "running_var", "min_val", "max_val"))]
    assert not set(same_state(second, third)) & set(grid)
    assert same_state(third, fourth) == []


def test_fake_quantization_before_its_epoch_is_off(tmp_path: Path) -> None:
    """Until then the outputs are the float network's, bit for bit."""
    qat = QuantizationAwareTraining(fake_quant_from=5, freeze_observers_at=None, convert=None)
    module = TinyModule()
    with pytest.warns(UserWarning, match="fake_quant_from=5 lies beyond the end of this run"):
        trainer(tmp_path, qat, max_epochs=1).fit(module)
    assert {bool(child.fake_quant_enabled) for _, child in fake_quantizes(module)} == {False}


class NoLeak(pl.Callback):
    """Compares all buffers of the networks before and after each validation.

    In the sanity check a weight meets its grid for the first time; that grid is the weight's own, and no
    image has part in it.
    """

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}
        self.compared: list[tuple[bool, list[str]]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.before = _copy(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.before = _copy(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        moved = same_state(self.before, _copy(pl_module))
        if trainer.sanity_checking:
            moved = [name for name in moved if "weight_fake_quant" not in name]
        self.compared.append((trainer.sanity_checking, moved))


def _copy(module: nn.Module) -> dict[str, Any]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("network", [Residual, Stubbed])
def test_validation_and_the_sanity_check_move_no_observer(tmp_path: Path, network: type[nn.Module]) -> None:
    compare = NoLeak()
    qat = QuantizationAwareTraining(freeze_observers_at=None)
    options: dict[str, Any] = {"max_epochs": 2, "val_check_interval": 3}
    trainer(tmp_path, qat, compare, **options).fit(TinyModule(network()))
    assert compare.compared == [(True, []), *[(False, [])] * 4]


def test_test_and_predict_move_no_observer(tmp_path: Path) -> None:
    module = TinyModule()
    runner = trainer(tmp_path, QuantizationAwareTraining(freeze_observers_at=None), max_epochs=1)
    runner.fit(module)
    before = _copy(module)
    runner.test(module, verbose=False)
    runner.predict(module, loader())
    runner.validate(module, verbose=False)
    assert same_state(before, _copy(module)) == []


def test_other_stages_leave_an_unprepared_module_alone(tmp_path: Path) -> None:
    module = TinyModule()
    runner = trainer(tmp_path, QuantizationAwareTraining())
    runner.test(module, verbose=False)
    runner.validate(module, verbose=False)
    assert recipe_of(module.model) is None
    assert list(fake_quantizes(module)) == []


def test_an_interrupted_validation_leaves_the_observers_on(tmp_path: Path) -> None:
    class Failing(TinyModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if not self.trainer.sanity_checking:
                raise RuntimeError("no disk")

    module = Failing()
    with pytest.raises(RuntimeError, match="no disk"):
        trainer(tmp_path, QuantizationAwareTraining(freeze_observers_at=None), max_epochs=1).fit(module)
    assert {bool(child.observer_enabled) for _, child in fake_quantizes(module)} == {True}


def test_gradient_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    spy = Spy()
    qat = QuantizationAwareTraining(freeze_observers_at=0.5)
    trainer(tmp_path, qat, spy, max_epochs=4, accumulate_grad_batches=3).fit(TinyModule())
    assert len(spy.seen) == 4 * STEPS
    # Eight optimizer steps: the fifth is the first with frozen observers.
    assert [phase.observe for _, phase in spy.seen] == [True] * 12 + [False] * 12


def test_max_steps_without_max_epochs(tmp_path: Path) -> None:
    spy = Spy()
    qat = QuantizationAwareTraining(freeze_observers_at=0.5, freeze_bn_at=0.75)
    trainer(tmp_path, qat, spy, max_epochs=-1, max_steps=8).fit(TinyModule())
    assert [phase.observe for _, phase in spy.seen] == [True] * 4 + [False] * 4
    assert [phase.freeze_bn for _, phase in spy.seen] == [False] * 6 + [True] * 2


def test_a_freeze_beyond_the_end_warns_once_and_never_fires(tmp_path: Path) -> None:
    spy = Spy()
    qat = QuantizationAwareTraining(freeze_bn_at=7, freeze_observers_at=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            trainer(tmp_path, qat, spy, max_epochs=1, enable_checkpointing=False).fit(TinyModule())
    words = [str(w.message) for w in caught if "lies beyond" in str(w.message)]
    assert words == ["freeze_bn_at=7 lies beyond the end of this run (1 epochs), so it will not happen."]
    assert not any(phase.freeze_bn for _, phase in spy.seen)


def test_fast_dev_run_is_one_epoch_of_one_batch(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(output_dir=tmp_path / "int8")
    trainer(tmp_path, qat, fast_dev_run=True).fit(TinyModule())
    assert qat.int8_module is not None
    assert qat.int8_path is None
    assert list(tmp_path.iterdir()) == []
    assert qat.int8_module(loader().dataset[0][0][None]).shape == (1, 4)


def test_it_says_what_it_does_in_one_line_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    qat = QuantizationAwareTraining(
        freeze_bn_at=1, freeze_observers_at=0.5, keep_float=["fc"], fake_quant_from=1
    )
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, qat, max_epochs=4).fit(TinyModule())
    words = ("Prepared", "Fake-quantization", "Observers", "Batch-norm", "Converted")
    lines = [m for r in caplog.records if (m := r.getMessage()).startswith(words)]
    assert lines == [
        "Prepared model: 2 layers for x86 in fx mode (it holds no QuantStubs), 1 kept float, "
        "2 ReLU6 became ReLU",
        "Fake-quantization is on at epoch 1, step 6",
        "Batch-norm statistics are frozen at epoch 1, step 6, at a learning rate of 0.05. "
        "With frozen statistics, such a high rate costs accuracy",
        "Observers are frozen at epoch 2, step 12",
        f"Converted to int8 the last weights, since no ModelCheckpoint monitors a metric: {qat.int8_path}",
    ]


def test_phase_at_can_be_overridden(tmp_path: Path) -> None:
    class OnlyObserve(QuantizationAwareTraining):
        def phase_at(self, trainer: pl.Trainer) -> Phase:
            return Phase(fake_quant=trainer.global_step % 2 == 0, observe=True, freeze_bn=False)

    spy = Spy()
    trainer(tmp_path, OnlyObserve(), spy, max_epochs=1).fit(TinyModule())
    assert [phase.fake_quant for _, phase in spy.seen] == [True, False] * 3


def test_no_warning_of_torch_ao_reaches_the_user(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner = trainer(tmp_path, QuantizationAwareTraining(), max_epochs=2)
        runner.fit(TinyModule())
        runner.test(verbose=False)
    places = {w.filename for w in caught}
    assert not any("torch/ao" in place or "qat_lightning" in place for place in places)
