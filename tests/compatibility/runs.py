"""A run with the callback and something else, and what must hold after it whatever the other thing is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from qat_lightning import QuantizationAwareTraining
from qat_lightning.base.schedule import Phase
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from qat_lightning.quantize.recipe import quantized_networks
from tests.networks import same_state, sqnr
from tests.runs import TinyModule, dataset, trainer

STEPS = 6
"""Batches of an epoch."""


class Run(NamedTuple):
    """What a run leaves behind."""

    trainer: pl.Trainer
    module: pl.LightningModule
    qat: QuantizationAwareTraining


def callback(**options: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(**{"backend": "onednn", "convert": "last", **options})


def fit(
    folder: Path,
    *others: pl.Callback,
    module: Any = TinyModule,
    qat: QuantizationAwareTraining | None = None,
    before: tuple[pl.Callback, ...] = (),
    ckpt_path: Path | None = None,
    **options: Any,
) -> Run:
    """Fits a module, with `before`, the callback and `others`; a class gives the same one each time."""
    torch.manual_seed(0)
    qat = callback() if qat is None else qat
    module = module() if isinstance(module, type) else module
    saves = any(isinstance(other, ModelCheckpoint) for other in others)
    defaults = {"max_epochs": 2, "enable_checkpointing": saves}
    runner = trainer(folder, *before, qat, *others, **{**defaults, **options})
    torch.manual_seed(1)
    runner.fit(module, ckpt_path=ckpt_path)
    return Run(runner, getattr(module, "_orig_mod", module), qat)


def outputs(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module.eval()(dataset(32, seed=2).tensors[0])


def check(run: Run, trained: pl.LightningModule | None = None, decibels: float = 40) -> None:
    """Asserts that the QAT did its work: ranges of data, rounding on, int8 that follows fake-quantization.

    Args:
        run: A finished run.
        trained: The module with the weights that were converted; by default the run's.
        decibels: How near int8 must be.
    """
    trained = run.module if trained is None else trained
    children = list(fake_quantizes(trained))
    assert children
    child: Any
    for name, child in children:
        low, high = child.activation_post_process.min_val, child.activation_post_process.max_val
        assert torch.isfinite(low).all(), name
        assert torch.isfinite(high).all(), name
        assert (low < high).all(), name
        assert (child.scale > 0).all(), name
        assert child.rounding, name
        assert child.fake_quant_enabled.item() == 1, name
    assert run.qat.int8_module is not None
    assert {recipe.int8 for _, _, recipe in quantized_networks(run.qat.int8_module)} == {True}
    assert list(fake_quantizes(run.qat.int8_module)) == []
    expected = outputs(trained)
    assert expected.std() > 0.01  # it is no constant
    assert sqnr(expected, outputs(run.qat.int8_module)) > decibels


def check_same(left: Run, right: Run) -> None:
    """Asserts that two runs ended with the same weights, ranges and int8 outputs, bit for bit."""
    assert same_state(left.module, right.module) == []
    assert left.qat.int8_module is not None
    assert right.qat.int8_module is not None
    assert torch.equal(outputs(left.qat.int8_module), outputs(right.qat.int8_module))


def refused(folder: Path, match: str, *others: pl.Callback, error: type[Exception], **options: Any) -> None:
    """Asserts that a run is refused before anything is trained."""
    module = options.pop("module", TinyModule)
    module = module() if isinstance(module, type) else module
    steps: list[int] = []
    module.on_train_batch_start = lambda batch, batch_idx: steps.append(batch_idx)
    with pytest.raises(error, match=match):
        fit(folder, *others, module=module, **options)
    assert steps == []


class Phases(pl.Callback):
    """Remembers, batch by batch, what the fake-quantizes and batch-norms were doing."""

    def __init__(self) -> None:
        self.seen: list[Phase] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        children: list[Any] = [child for _, child in fake_quantizes(pl_module)]
        observe = {child.observing for child in children if child.axis is None}  # weights' always do
        fake_quant = {child.rounding for child in children}
        frozen = {not m.training for m in pl_module.modules() if isinstance(m, nn.BatchNorm2d)}
        assert len(observe) == len(fake_quant) == len(frozen) == 1
        self.seen.append(Phase(fake_quant.pop(), observe.pop(), frozen.pop()))


class Weights(pl.Callback):
    """Remembers the parameters at each epoch start and after each step."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Tensor]] = []
        self.steps: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.steps.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


class Still(pl.Callback):
    """Asserts that no validation moves a buffer, but the grid of a weight that is seen for the first time."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.validations = 0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.before = {name: b.clone() for name, b in pl_module.named_buffers() if "enabled" not in name}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validations += 1
            assert same_state(self.before, {name: pl_module.get_buffer(name) for name in self.before}) == []
