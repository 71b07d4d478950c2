"""Runs of a module without an example: the callback looks at a batch, captures, trains, resumes, converts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from qat_lightning import (
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RankMismatchError,
    load_int8,
    load_qat_checkpoint,
    prepare,
)
from qat_lightning.base import random_state
from qat_lightning.quantize.recipe import recipe_of
from qat_lightning.run.distributed import graphs_check
from tests.networks import same_state, sqnr
from tests.reading import Reading, ToldHow, logits, sentences
from tests.runs import trainer
from tests.test_resume import Crash, CrashAt, seed

# A resumed run writes beside the first one's checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")

LAYERS = {"query", "key", "value", "head"}
STEPS = 6


def fit(
    folder: Path,
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    ckpt_path: Path | None = None,
    **options: Any,
) -> QuantizationAwareTraining:
    """Trains a module for four epochs, and keeps a checkpoint of each."""
    qat = QuantizationAwareTraining(convert="last", freeze_observers_at=0.6, output_dir=folder)
    checkpoint = ModelCheckpoint(folder / "ckpt", monitor="val_loss", save_top_k=-1, filename="{epoch}")
    runner = trainer(folder, qat, checkpoint, *callbacks, **{"max_epochs": 4, **options})
    runner.fit(module, ckpt_path=ckpt_path)
    return qat


def whole_run(folder: Path, build: type[Reading] = Reading) -> tuple[Reading, QuantizationAwareTraining]:
    """Trains without an interruption."""
    seed()
    module = build()
    return module, fit(folder, module)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reading, QuantizationAwareTraining]:
    """The folder of a run, its module and its callback."""
    folder = tmp_path_factory.mktemp("whole")
    return (folder, *whole_run(folder))


Whole = tuple[Path, Reading, QuantizationAwareTraining]


def same_run(one: pl.LightningModule, other: pl.LightningModule) -> list[str]:
    """The names of what two runs ended with differently: weights, ranges, qparams, recipes.

    The sentences of the examples may differ: `Sentences` draws a word of each whenever it is read.
    """
    found = same_state(one, other) + same_state(dict(one.named_buffers()), dict(other.named_buffers()))
    one_recipe, other_recipe = (recipe_of(each.get_submodule("model")) for each in (one, other))
    assert one_recipe is not None
    assert other_recipe is not None
    assert replace(one_recipe, example=None) == replace(other_recipe, example=None)
    return [name for name in found if name != "model._qat_recipe"]


def test_every_layer_trains_and_becomes_int8(whole: Whole) -> None:
    _, module, qat = whole
    recipe = recipe_of(module.model)
    assert recipe is not None
    assert recipe.example is not None
    assert set(recipe.layers) == LAYERS
    (report,) = qat.preflight_reports
    assert (report.layers, report.float_layers) == (len(LAYERS), ())
    assert qat.int8_module is not None
    assert sqnr(logits(module), logits(qat.int8_module)) > 40
    assert logits(module).std() > 0.1


def test_a_resumed_run_ends_with_the_same_bits(whole: Whole, tmp_path: Path) -> None:
    _, module, qat = whole
    seed()
    with pytest.raises(Crash):
        fit(tmp_path, Reading(), CrashAt(2 * STEPS + 2))
    torch.manual_seed(99)
    resumed = Reading()
    again = fit(tmp_path, resumed, ckpt_path=tmp_path / "ckpt/epoch=1.ckpt")
    assert same_run(module, resumed) == []
    assert qat.int8_module is not None
    assert again.int8_module is not None
    assert torch.equal(logits(qat.int8_module), logits(again.int8_module))


def test_a_checkpoint_is_loaded_into_a_fresh_module(whole: Whole) -> None:
    folder, module, _ = whole
    loaded = load_qat_checkpoint(folder / "ckpt/epoch=3.ckpt", Reading())
    assert torch.equal(logits(module), logits(loaded))
    assert set(dict(loaded.named_buffers())) == set(dict(module.named_buffers()))


def test_an_int8_file_is_loaded_into_a_fresh_module(whole: Whole) -> None:
    _, _, qat = whole
    assert qat.int8_module is not None
    assert qat.int8_path is not None
    loaded = load_int8(qat.int8_path, Reading())
    assert torch.equal(logits(qat.int8_module), logits(loaded))


def test_the_run_is_that_of_a_module_with_an_example(whole: Whole, tmp_path: Path) -> None:
    _, module, _ = whole
    told, _ = whole_run(tmp_path, ToldHow)
    assert same_run(module, told) == []
    assert told.steps == module.steps


class Logs(DummyLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[Any] = []

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.logged.append((args, kwargs))


class Watch(pl.Callback):
    """Keeps what a module, its metrics, the logger and the random generators are like in `setup`."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        module: Any = pl_module
        self.random = random_state.capture()
        self.objects = {
            name: id(value) for name, value in vars(module).items() if name[0] != "_" or name == "_trainer"
        }
        self.objects |= {name: id(p) for name, p in module.model.named_parameters()}
        self.values = {name: p.detach().clone() for name, p in module.model.named_parameters()}
        self.metric = id(module.accuracy), *(float(v) for v in module.accuracy.metric_state.values())
        self.modes = module.training, module.model.training, module.accuracy.training
        self.steps, self.logged = [*module.steps], [*trainer.logger.logged]  # type: ignore[union-attr]
        self.results = dict(trainer.callback_metrics), trainer.global_step, trainer.state.fn


def watched_setup(folder: Path, module: Reading) -> tuple[Watch, Watch]:
    """What `Watch` sees before and after the callback's setup."""
    before, after = Watch(), Watch()
    module.accuracy.update(torch.tensor([0, 1]), torch.tensor([0, 2]))
    qat = QuantizationAwareTraining(convert=None)
    seed()
    trainer(folder, before, qat, after, logger=Logs(), max_epochs=1, enable_checkpointing=False).fit(module)
    assert recipe_of(module.model) is not None
    return before, after


def test_looking_at_a_batch_changes_nothing(tmp_path: Path) -> None:
    module = Reading()
    before, after = watched_setup(tmp_path, module)
    assert same_state(before.values, after.values) == []
    for name in ("objects", "metric", "modes", "steps", "logged", "results"):
        assert getattr(before, name) == getattr(after, name), name
    assert sum(before.metric[1:]) > 0
    assert module.steps[0] == "validation"  # the sanity check's, after the callback looked


def test_looking_at_a_batch_draws_no_random_number(tmp_path: Path) -> None:
    """Preparing a network draws some: layers are initialized before they get their weights."""
    (_, looked), (_, told) = (watched_setup(tmp_path, build()) for build in (Reading, ToldHow))
    assert random_state.same_state(looked.random, told.random)


class TrainsOnly(Reading):
    """Has no validation."""

    validation_step = pl.LightningModule.validation_step  # type: ignore[assignment]
    val_dataloader = pl.LightningModule.val_dataloader  # type: ignore[assignment]


def test_a_training_step_shows_the_call_where_there_is_no_validation(tmp_path: Path) -> None:
    module = TrainsOnly()
    qat = QuantizationAwareTraining(convert="last", output_dir=tmp_path)
    trainer(tmp_path, qat, max_epochs=1, enable_checkpointing=False).fit(module)
    recipe = recipe_of(module.model)
    assert recipe is not None
    assert recipe.example is not None
    assert module.steps == ["training"] * STEPS  # the copy's are not the module's


class Fails(Reading):
    """Has a step that fails before it calls the network."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        raise KeyError("labels")


def test_a_step_that_fails_says_what_it_was_run_for(tmp_path: Path) -> None:
    message = r"how its networks are called, a copy of Fails ran its validation_step .*'labels'.*KeyError"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, QuantizationAwareTraining(), max_epochs=1).fit(Fails())


def test_a_captured_network_is_quantized_without_training(tmp_path: Path) -> None:
    module = Reading()
    ptq = PostTrainingQuantization()
    trainer(tmp_path, ptq).validate(module, sentences(24, seed=1), verbose=False)
    assert ptq.int8_module is not None
    recipe = recipe_of(ptq.int8_module.get_submodule("model"))
    assert recipe is not None
    assert set(recipe.layers) >= LAYERS
    assert sqnr(logits(module), logits(ptq.int8_module)) > 20


class ByWidth(nn.Module):
    """Takes one of two paths, by the width of its input, and compares its height."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x) * int(x.shape[2])
        return y + 1 if x.shape[3] > 4 else y


def test_ranks_that_captured_different_graphs_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(height: int, width: int) -> dict[str, nn.Module]:
        return {"model": prepare(ByWidth(), example_inputs=torch.randn(2, 3, height, width))}

    ranks: list[dict[str, nn.Module]] = []

    def gather(own: dict[str, str]) -> list[dict[str, str]]:
        return [{name: graphs_check._digest(network) for name, network in rank.items()} for rank in ranks]

    monkeypatch.setattr(graphs_check, "gather", gather)
    ranks[:] = captured(8, 8), captured(8, 6)
    graphs_check.check_same_graphs(ranks[0])
    ranks[:] = captured(8, 8), captured(8, 4)
    with pytest.raises(RankMismatchError, match=r"Rank 1 and rank 0 captured different graphs of 'model'"):
        graphs_check.check_same_graphs(ranks[0])
