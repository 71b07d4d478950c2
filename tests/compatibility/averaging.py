"""Averages of weights: the int8 network has them, on grids of their own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from qat_lightning import load_qat_checkpoint
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from tests.compatibility.callbacks import Scored, best_two
from tests.compatibility.registry import Section
from tests.compatibility.runs import STEPS, Run, Weights, callback, check, check_same, fit, refused
from tests.networks import CLASSES, SIZE, same_state
from tests.runs import TinyModule

row = Section("Averaged weights")

DECAY = 0.8


def check_parameters(run: Run, expected: dict[str, Tensor]) -> None:
    for name, parameter in run.module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], msg=name)


def check_grids(module: nn.Module) -> None:
    """Asserts that each grid is exactly the one of its range."""
    child: Any
    for name, child in fake_quantizes(module):
        scale, zero_point = child.scale.clone(), child.zero_point.clone()
        child.refresh()
        assert torch.equal(scale, child.scale), name
        assert torch.equal(zero_point, child.zero_point), name


def check_weights_fit(module: nn.Module) -> None:
    """Asserts that the greatest weight of each channel lies on the end of its grid."""
    fused: list[Any] = [m for m in module.modules() if hasattr(m, "weight_fake_quant")]
    for layer in fused:
        weight = layer.weight.detach()
        if hasattr(layer, "bn"):
            factor = layer.bn.weight / (layer.bn.running_var + layer.bn.eps).sqrt()
            weight = weight * factor.detach().view(-1, 1, 1, 1)
        used = weight.abs().flatten(1).amax(1) / layer.weight_fake_quant.scale
        torch.testing.assert_close(used, torch.full_like(used, 127.0))


def averaged(weights: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([w[name] for w in weights]).mean(0) for name in weights[0]}


def moving(weights: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    average, *rest = weights
    for values in rest:
        average = {name: DECAY * average[name] + (1 - DECAY) * value for name, value in values.items()}
    return average


@row(
    "EMAWeightAveraging",
    "callbacks=[qat, EMAWeightAveraging(decay=0.999)]",
    "works; the averaged weights are validated, saved and converted, with averaged batch-norm statistics and "
    "averaged ranges",
)
def ema_weight_averaging(folder: Path) -> None:
    weights = Weights()
    run = fit(folder, EMAWeightAveraging(decay=DECAY), weights, max_epochs=4)
    check_parameters(run, moving(weights.steps))
    check_grids(run.module)
    check_weights_fit(run.module)
    check(run)
    alone = Weights()
    fit(folder, alone, max_epochs=4)
    assert same_state(weights.steps[-1], alone.steps[-1]) == []  # training itself knows nothing of it


@row(
    "EMAWeightAveraging",
    'callbacks=[qat, EMAWeightAveraging(), ModelCheckpoint(monitor="acc")]',
    "works; the best checkpoint holds the averaged weights, and those are converted",
)
def ema_and_the_best_checkpoint(folder: Path) -> None:
    each_step: dict[str, Any] = {}
    each_epoch = {"update_every_n_steps": 0, "update_starting_at_epoch": 0}
    for i, when in enumerate((each_step, each_epoch)):
        averaging = EMAWeightAveraging(decay=DECAY, **when)
        checkpoint = best_two(folder / str(i), save_on_train_epoch_end=False)
        qat = callback(convert="best", fake_quant_from=1)
        run = fit(folder, averaging, checkpoint, module=Scored, qat=qat, max_epochs=4)
        assert run.qat.converted_from == str(folder / str(i) / "epoch=1.ckpt")
        content = torch.load(checkpoint.best_model_path, weights_only=True)
        current, average = content["current_model_state"], content["state_dict"]
        assert not torch.equal(current["model.fc.weight"], average["model.fc.weight"])
        best = load_qat_checkpoint(checkpoint.best_model_path, Scored())
        check_grids(best)
        check(run, best)


@row(
    "EMAWeightAveraging",
    "EMAWeightAveraging(use_buffers=False)",
    "works, with the ranges and batch-norm statistics of the last weights; averaged ones, the default, suit "
    "averaged weights better",
)
def ema_without_buffers(folder: Path) -> None:
    weights = Weights()
    run = fit(folder, EMAWeightAveraging(decay=DECAY, use_buffers=False), weights, max_epochs=4)
    check_parameters(run, moving(weights.steps))
    check_grids(run.module)
    check_weights_fit(run.module)
    check(run)


@row(
    "EMAWeightAveraging, StochasticWeightAveraging",
    "trainer.fit(module, ckpt_path=path)",
    "works; a resumed run ends like an uninterrupted one, bit for bit",
)
def averaging_resumed(folder: Path) -> None:
    def ema() -> pl.Callback:
        return EMAWeightAveraging(decay=DECAY)

    def swa() -> pl.Callback:
        return StochasticWeightAveraging(0.01, swa_epoch_start=1)

    for average in (ema, swa):
        place = folder / average.__name__
        whole = fit(place, average(), ModelCheckpoint(place, "{epoch}", save_top_k=-1), max_epochs=3)
        again = ModelCheckpoint(place, "{epoch}", save_top_k=-1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists", UserWarning)
            rest = fit(place, average(), again, max_epochs=3, ckpt_path=place / "epoch=1.ckpt")
        check_same(whole, rest)
        check(rest)


@row("WeightAveraging", "callbacks=[qat, WeightAveraging()]", "works, likewise")
def weight_averaging(folder: Path) -> None:
    weights = Weights()
    run = fit(folder, WeightAveraging(), weights, max_epochs=4)
    check_parameters(run, averaged(weights.steps))
    check_grids(run.module)
    check_weights_fit(run.module)
    check(run)


@row("WeightAveraging", "callbacks=[WeightAveraging(), qat]", "refused: it would average the float network")
def weight_averaging_first(folder: Path) -> None:
    match = r"WeightAveraging comes before QuantizationAwareTraining.*callbacks=\[Quant"
    for other in (WeightAveraging(), EMAWeightAveraging()):
        refused(folder, match, before=(other,), error=MisconfigurationException)


@row(
    "WeightAveraging",
    "qat with a qconfig of torch's own",
    "refused: the ranges of torch's fake-quantize change their shape and cannot be averaged",
)
def weight_averaging_of_torchs_own(folder: Path) -> None:
    match = "ranges that can be averaged.*FusedMovingAvg.*Leave `qconfig` out"
    qat = callback(qconfig="torch")
    refused(folder, match, WeightAveraging(), qat=qat, error=MisconfigurationException)


@row(
    "StochasticWeightAveraging",
    "callbacks=[qat, StochasticWeightAveraging(0.01)]",
    "works; it adds an epoch for batch-norm statistics, in which the ranges follow, frozen or not; "
    '`convert="last"` converts the averaged weights, and so does `"best"` if they are the best; fractions '
    "refer to the run with that epoch",
)
def stochastic_weight_averaging(folder: Path) -> None:
    weights, statistics = Weights(), Statistics()
    qat = callback(freeze_bn_at=2, freeze_observers_at=1)
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)
    run = fit(folder, swa, weights, statistics, qat=qat, max_epochs=4)
    check_parameters(run, averaged(weights.epochs[:4]))
    assert run.trainer.current_epoch == 5
    assert statistics.moved == [True, True, False, False, True]
    check_weights_fit(run.module)
    check(run)


class Statistics(pl.Callback):
    """Remembers in which epochs the batch-norm statistics moved."""

    def __init__(self) -> None:
        self.moved: list[bool] = []
        self.before: dict[str, Tensor] = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.before = self.means(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.moved.append(bool(same_state(self.before, self.means(pl_module))))

    @staticmethod
    def means(module: nn.Module) -> dict[str, Tensor]:
        return {name: b.clone() for name, b in module.named_buffers() if name.endswith("running_mean")}


@row(
    "StochasticWeightAveraging",
    "the same, without batch-norm",
    "works; the ranges are those of the last weights, because no data passes through the averaged ones",
)
def swa_without_batch_norm(folder: Path) -> None:
    weights = Weights()
    layers = (nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    module = TinyModule(nn.Sequential(*layers), lr=0.01)
    run = fit(
        folder, StochasticWeightAveraging(0.01, swa_epoch_start=1), weights, module=module, max_epochs=4
    )
    assert len(weights.steps) == 4 * STEPS
    check_parameters(run, averaged(weights.epochs))
    check_weights_fit(run.module)
    check(run)


@row("StochasticWeightAveraging", "callbacks=[StochasticWeightAveraging(0.01), qat]", "refused, likewise")
def swa_first(folder: Path) -> None:
    match = "StochasticWeightAveraging comes before QuantizationAwareTraining"
    refused(folder, match, before=(StochasticWeightAveraging(0.01),), error=MisconfigurationException)
