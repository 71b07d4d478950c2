"""A float teacher's term in the gradient: that of a loss written by hand, however the loss is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qat_lightning import Distillation, QuantizationAwareTraining
from qat_lightning.run.parts.distillation import METRIC
from qat_lightning.run.parts.divergence import divergence
from tests.networks import CLASSES, Residual
from tests.runs import TinyModule, trainer

WEIGHT, TEMPERATURE = 3.0, 2.0
Gradients = dict[str, Tensor]


class FirstGradients(pl.Callback):
    """The gradients of the first optimizer step, unscaled."""

    def __init__(self) -> None:
        self.gradients: Gradients = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not self.gradients:
            named = pl_module.named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


def term(logits: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = (each.float() / TEMPERATURE for each in (logits, teacher))
    target = theirs.softmax(1)
    return WEIGHT * TEMPERATURE**2 * F.kl_div(ours.log_softmax(1), target, reduction="batchmean")


class Steps(TinyModule):
    """With a teacher of its own, adds the term by hand."""

    def __init__(self, network: nn.Module | None = None, teacher: nn.Module | None = None) -> None:
        super().__init__(network)
        self.teacher = (teacher,)  # in a tuple: no submodule

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(*batch)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self(x)
        return F.cross_entropy(logits, y) + self.by_hand(x, logits)

    def by_hand(self, x: Tensor, logits: Tensor) -> Tensor:
        (teacher,) = self.teacher
        if teacher is None:
            return torch.zeros(())
        with torch.no_grad():
            return_of_teacher = teacher.eval()(x)
        return term(logits, return_of_teacher)


class DictSteps(Steps):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.loss(*batch), "other": 1}


class TwoCalls(Steps):
    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return super().loss(x, y) + super().loss(x.flip(3), y)


class Manual(Steps):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(*batch))
        optimizer.step()


class Retained(Manual):
    """Goes backward twice through one forward, with half of the loss each."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        x, y = batch
        logits = self(x)
        half = F.cross_entropy(logits, y) / 2
        self.manual_backward(half, retain_graph=True)
        self.manual_backward(half + self.by_hand(x, logits))
        optimizer.step()


class Penalty(Steps):
    """A gradient penalty: a backward of its own through the logits, which the teacher has no part in."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.requires_grad_()
        logits = self(x)
        loss = F.cross_entropy(logits, y)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + slope.pow(2).sum() + self.by_hand(x, logits)


class Checkpointed(Steps):
    """Recomputes the network in the backward."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.model(x)
        return checkpoint(self.model, x.requires_grad_(), use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


class Overwriting(Steps):
    """Works on the logits in place."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self(x)
        hand = self.by_hand(x, logits)
        return F.cross_entropy(logits.mul_(2), y) + hand


KINDS = [Steps, DictSteps, TwoCalls, Manual, Retained, Penalty, Checkpointed, Reentrant, Overwriting]
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "accumulated": lambda: {"accumulate_grad_batches": 2},
    "bf16": lambda: {"precision": "bf16-mixed"},
    "clipped": lambda: {"gradient_clip_val": 0.1},
    "scaled": lambda: {
        "accumulate_grad_batches": 2,
        "plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))],
    },
}


class NoDropout(Residual):
    """Recomputed, a batch-norm moves twice; that is nothing that concerns a teacher."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((x + self.block(x)).mean((2, 3)))


def networks() -> tuple[nn.Module, nn.Module]:
    """A student and another teacher, the same ones every time."""
    torch.manual_seed(5)
    return NoDropout(), NoDropout()


def first_gradients(
    folder: Path, module: pl.LightningModule, teacher: Any, **options: Any
) -> tuple[Gradients, pl.Trainer]:
    spy = FirstGradients()
    distillation = None if teacher is None else Distillation(teacher, WEIGHT, TEMPERATURE)
    qat = QuantizationAwareTraining(convert=None, preflight=False, distillation=distillation)
    torch.manual_seed(1)
    quiet = {"limit_val_batches": 0, "enable_checkpointing": False}
    runner = trainer(folder, qat, spy, max_epochs=1, limit_train_batches=2, **quiet, **options)
    runner.fit(module)
    return spy.gradients, runner


def check_gradients(folder: Path, kind: type[Steps], tolerance: float = 1e-5, **options: Any) -> None:
    student, teacher = networks()
    by_hand, _ = first_gradients(folder, kind(student, teacher), None, **options)
    student, teacher = networks()
    found, runner = first_gradients(folder, kind(student), teacher, **options)
    student, _ = networks()
    without, _ = first_gradients(folder, kind(student), None, **options)
    assert found.keys() == by_hand.keys()
    for name, gradient in by_hand.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=tolerance * size, msg=name)
    weight = "model.fc.weight"
    assert not torch.allclose(without[weight], by_hand[weight], rtol=0.05)
    assert runner.callback_metrics[METRIC] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_sum(tmp_path: Path, kind: type[Steps]) -> None:
    # What is recomputed with a moved batch-norm asks the teacher about slightly other logits.
    options = {"accumulate_grad_batches": 2} if kind is Penalty else {}
    check_gradients(tmp_path, kind, tolerance=0.02 if kind is Reentrant else 1e-5, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_gradient_is_scaled_as_the_loss_is(tmp_path: Path, name: str) -> None:
    student, teacher = networks()
    options = OPTIONS[name]
    tolerance = {"bf16": 0.02, "scaled": 0.005}.get(name, 1e-5)
    by_hand, _ = first_gradients(tmp_path, Steps(student, teacher), None, **options())
    student, teacher = networks()
    found, _ = first_gradients(tmp_path, Steps(student), teacher, **options())
    for key, gradient in by_hand.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=tolerance * size, msg=key)


def test_divergence_is_the_usual_one() -> None:
    logits, teacher = torch.randn(6, CLASSES, requires_grad=True), torch.randn(6, CLASSES)
    expected = term(logits, teacher) / WEIGHT
    value, gradient = divergence(logits, teacher, TEMPERATURE)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_divergence_of_pixels_is_the_mean_over_them() -> None:
    logits, teacher = torch.randn(2, 6, CLASSES), torch.randn(2, 6, CLASSES)
    maps = [each.transpose(1, 2).reshape(2, CLASSES, 3, 2) for each in (logits, teacher)]
    flat = divergence(logits.flatten(0, 1), teacher.flatten(0, 1), TEMPERATURE)
    torch.testing.assert_close(divergence(maps[0], maps[1], TEMPERATURE)[0], flat[0])
