"""Trains a task in float, then on for int8 and, for as many epochs, in float; tests every form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, seed_everything
from torch.utils.data import DataLoader

from examples.ocr.data import Drawn, Lines, Pages, fixed_data, training_data
from examples.ocr.detection import Detection
from examples.ocr.recognition import Recognition
from examples.trainers import trainer
from qat_lightning import PostTrainingQuantization, QuantizationAwareTraining

Scores = dict[str, dict[str, float]]
"""The metrics of each form of a network."""
BACKEND = "onednn"
RATE, TUNING_RATE = 3e-3, 1e-3
FILES = {".pt": "int8", ".onnx": "int8 in ONNX Runtime"}


class Task(NamedTuple):
    """What to train, on which data, which layers stay float, and how many new images an epoch has."""

    module: type[Recognition] | type[Detection]
    data: type[Drawn]
    keep_float: Sequence[str]
    images: int


TASKS = {
    "recognition": Task(Recognition, Lines, ["head"], 4096),
    "detection": Task(Detection, Pages, [], 1536),
}


@dataclass(frozen=True)
class Budget:
    """How long to train, and how much to test.

    Attributes:
        epochs: Epochs of float training.
        tuning: Epochs of what follows: training for int8, or more float training.
        tested: Images to test with.
        images: New images in each epoch; by default what the task says.
    """

    epochs: int
    tuning: int
    tested: int
    images: int | None = None


def compare(task: Task, budget: Budget, seed: int, folder: Path) -> Scores:
    """Returns the test metrics of float and of every int8 form, of which `folder` gets the files."""
    seed_everything(seed, verbose=False)
    val, test = (fixed_data(task.data(split), n) for split, n in (("val", 256), ("test", budget.tested)))

    def fit(module: LightningModule, epochs: int, seed: int, *callbacks: Callback) -> LightningModule:
        train = training_data(task.data("train"), budget.images or task.images, seed)
        trainer(*callbacks, max_epochs=epochs).fit(module, train, val)
        return module

    start = fit(task.module(RATE), budget.epochs, 2 * seed).state_dict()
    tuned, module = task.module(TUNING_RATE), task.module(TUNING_RATE)
    tuned.load_state_dict(start)
    module.load_state_dict(start)

    fit(tuned, budget.tuning, 2 * seed + 1)
    ptq = PostTrainingQuantization(backend=BACKEND, keep_float=task.keep_float)
    trainer(ptq).validate(tuned, val, verbose=False)

    qat = QuantizationAwareTraining(
        backend=BACKEND, keep_float=task.keep_float, export=["torch", "onnx"], output_dir=folder
    )
    fit(module, budget.tuning, 2 * seed + 1, qat)

    forms = {"float": tuned, "int8, not trained": ptq.int8_module, "fake-quant": module}
    forms |= {FILES[path.suffix]: qat.shipped(task.module(), path) for path in qat.exported}
    return {name: tested(form, test) for name, form in forms.items()}


def tested(module: LightningModule | None, data: DataLoader[Any]) -> dict[str, float]:
    """Returns the metrics that the module's own `test_step` logs."""
    (metrics,) = trainer().test(module, data, verbose=False)
    return {name: float(value) for name, value in metrics.items()}
