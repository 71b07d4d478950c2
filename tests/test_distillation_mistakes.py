"""What no teacher can be, and no run with one: refused in words, at the first batch at the latest."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from qat_lightning import Distillation, QuantizationAwareTraining, prepare
from tests.networks import CLASSES, Residual
from tests.runs import TinyModule, trainer
from tests.test_distillation import Manual
from tests.test_teachers import Pair


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"teacher": "float"}, ValueError, 'teacher must be "self" or a network itself'),
        ({"teacher": 3}, TypeError, 'teacher must be "self", a float network'),
        ({"teacher": {}}, ValueError, "must name at least one network"),
        ({"teacher": {"model": "other"}}, ValueError, 'teacher must be "self"'),
        ({"teacher": prepare(Residual())}, ValueError, "is quantized already"),
        ({"weight": 0}, ValueError, "weight must be above 0 .* distillation=None"),
        ({"weight": "1"}, TypeError, "weight must be a number"),
        ({"temperature": -1.0}, ValueError, "temperature must be above 0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be above 0"),
    ],
)
def test_mistakes_in_the_arguments(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Distillation(**options)


class Chain(TinyModule):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        self.head = nn.Sequential(nn.Conv2d(8, CLASSES, 1), nn.Flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model(x)).mean(2)


class Single(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3 * 12 * 12, 1))


class Regression(TinyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]).squeeze(1), batch[1].float())


class Unused(TinyModule):
    """A loss that does not depend on what the network returns."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(p.pow(2).sum() for p in self.parameters())  # type: ignore[return-value]


class Unannounced(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> Any:  # no manual_backward
        self.loss(*batch).backward()
        self.optimizers().step()  # type: ignore[union-attr]


MISTAKES: dict[str, tuple[Callable[[], pl.LightningModule], Any, str]] = {
    "chain": (Chain, {"head": "self"}, "comes out of other trained layers"),
    "regression": (lambda: Regression(Single()), "self", "at least two classes.*'model'"),
    "classes": (TinyModule, nn.Sequential(nn.Flatten(), nn.Linear(432, 3)), r"\(8, 4\), but .* \(8, 3\)"),
    "unused": (Unused, "self", "had no part in its gradient"),
    "unannounced": (lambda: Unannounced(Residual()), "self", "manual_backward"),
    "unknown": (TinyModule, {"modle": "self"}, "Nearest: 'model'"),
    "ambiguous": (Pair, Residual(), "One teacher teaches one network, but 2 are prepared"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_show_at_the_first_batch_at_the_latest(tmp_path: Path, name: str) -> None:
    build, teacher, words = MISTAKES[name]
    qat = QuantizationAwareTraining(distillation=Distillation(teacher), convert=None)
    runner = trainer(tmp_path, qat, max_epochs=1, limit_val_batches=0)
    with pytest.raises((ValueError, MisconfigurationException), match=re.compile(words, re.DOTALL)):
        runner.fit(build())
    assert runner.global_step <= 1


def test_a_compiled_module_is_refused(tmp_path: Path) -> None:
    class Compiled(TinyModule):
        def on_fit_start(self) -> None:
            self.model.compile(backend="eager")

    qat = QuantizationAwareTraining(distillation=Distillation())
    with pytest.raises(MisconfigurationException, match=r"Leave torch\.compile out"):
        trainer(tmp_path, qat, max_epochs=1, limit_val_batches=0).fit(Compiled())
