"""Evaluation, before and after fit, and checkpoints outside of the run that wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from qat_lightning import RecipeMismatchError, load_int8, load_qat_checkpoint
from qat_lightning.fake_quant.fake_quantize import fake_quantizes
from tests.compatibility.callbacks import Scored, best_two
from tests.compatibility.registry import Section
from tests.compatibility.runs import Run, callback, check, check_same, fit, outputs
from tests.networks import same_state
from tests.runs import TinyModule, loader, trainer

row = Section("Evaluation and checkpoints")


def saved(folder: Path) -> tuple[Run, str]:
    checkpoint = ModelCheckpoint(folder)
    run = fit(folder, checkpoint)
    return run, checkpoint.best_model_path


@row(
    "validate, test, predict before fit",
    "Trainer(callbacks=[qat]).test(module)",
    "works; the module is float and stays float, and a later fit does not change",
)
def evaluation_before_fit(folder: Path) -> None:
    torch.manual_seed(0)
    module = TinyModule()
    before = outputs(module)
    runner = trainer(folder, callback(), enable_checkpointing=False)
    runner.test(module, verbose=False)
    runner.validate(module, verbose=False)
    predicted: Any = runner.predict(module, loader(32, seed=2))
    assert list(fake_quantizes(module)) == []
    assert torch.equal(torch.cat(predicted), before)
    module.train()
    run = fit(folder, module=module)
    check(run)
    check_same(run, fit(folder))


@row(
    "validate, test, predict after fit",
    'trainer.test(module), trainer.test(ckpt_path="best")',
    "works, with the fake-quantized network; no range changes",
)
def evaluation_after_fit(folder: Path) -> None:
    checkpoint = best_two(folder)
    run = fit(folder, checkpoint, module=Scored(), qat=callback(convert="best"), max_epochs=3)
    state = {name: value.clone() for name, value in run.module.state_dict().items()}
    predicted: Any = run.trainer.predict(run.module, loader(32, seed=2))
    assert torch.equal(torch.cat(predicted), outputs(run.module))
    run.trainer.validate(run.module, verbose=False)
    run.trainer.test(run.module, verbose=False)
    assert same_state(state, dict(run.module.state_dict())) == []
    run.trainer.test(run.module, ckpt_path="best", verbose=False)
    best = load_qat_checkpoint(checkpoint.best_model_path, Scored())
    assert same_state(best, run.module) == []
    check(run)


@row(
    "Evaluating int8", "Trainer().test(qat.int8_module)", "works, on the CPU, with the module's own test_step"
)
def evaluating_int8(folder: Path) -> None:
    run, _ = saved(folder)
    assert run.qat.int8_module is not None
    (fake,) = run.trainer.test(run.module, verbose=False)
    (int8,) = trainer(folder).test(run.qat.int8_module, verbose=False)
    assert int8["test_accuracy"] == pytest.approx(fake["test_accuracy"], abs=0.04)
    loaded = load_int8(str(run.qat.int8_path), TinyModule())
    predicted: Any = trainer(folder).predict(loaded, loader(32, seed=2))
    assert torch.equal(torch.cat(predicted), outputs(run.qat.int8_module))


@row(
    "A QAT checkpoint in a new process",
    "Trainer().test(load_qat_checkpoint(path, Module()))",
    "works, as do validate, predict and `convert`",
)
def checkpoint_in_a_fresh_module(folder: Path) -> None:
    run, path = saved(folder)
    module = load_qat_checkpoint(path, TinyModule())
    runner = trainer(folder, callback())
    assert runner.test(module, verbose=False) == run.trainer.test(run.module, verbose=False)
    assert runner.validate(module, verbose=False) == run.trainer.validate(run.module, verbose=False)
    predicted: Any = runner.predict(module, loader(32, seed=2))
    assert torch.equal(torch.cat(predicted), outputs(run.module))


@row(
    "A QAT checkpoint in a new process",
    "Trainer(callbacks=[qat]).test(Module(), ckpt_path=path)",
    "works; the module is prepared when the weights load",
)
def checkpoint_path_of_a_fresh_module(folder: Path) -> None:
    run, path = saved(folder)
    runner = trainer(folder, callback(), ModelCheckpoint(folder))
    module = TinyModule()
    assert runner.test(module, ckpt_path=path, verbose=False) == run.trainer.test(run.module, verbose=False)
    assert same_state(module, run.module) == []
    validated = runner.validate(TinyModule(), ckpt_path=path, verbose=False)
    assert validated == run.trainer.validate(run.module, verbose=False)
    predicted: Any = runner.predict(TinyModule(), loader(32, seed=2), ckpt_path=path)
    assert torch.equal(torch.cat(predicted), outputs(run.module))
    with pytest.raises(RecipeMismatchError, match="another quantization recipe"):
        trainer(folder, callback(keep_float=["fc"]), ModelCheckpoint(folder)).test(
            TinyModule(), ckpt_path=path, verbose=False
        )


class Loose(TinyModule):
    """Has layers of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten())
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


@row(
    "A QAT checkpoint in a new process",
    "the same, where the module has layers itself",
    "refused: the error names `load_qat_checkpoint`, which reads it",
)
def checkpoint_path_of_loose_layers(folder: Path) -> None:
    checkpoint = ModelCheckpoint(folder)
    run = fit(folder, checkpoint, module=Loose)
    path = checkpoint.best_model_path
    match = r"weights are from a QAT run, but this Loose is float.*load_qat_checkpoint\(path, Loose"
    with pytest.raises(RecipeMismatchError, match=match):
        trainer(folder, callback()).test(Loose(), ckpt_path=path, verbose=False)
    assert torch.equal(outputs(load_qat_checkpoint(path, Loose())), outputs(run.module))


@row(
    "A QAT checkpoint in load_from_checkpoint",
    "Module.load_from_checkpoint(path)",
    "refused by PyTorch, which lists the keys of a prepared network as unexpected, among them `_qat_recipe`; "
    "it calls no callback. Use `load_qat_checkpoint(path, Module())`",
)
def load_from_checkpoint(folder: Path) -> None:
    run, path = saved(folder)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_qat_recipe"):
        TinyModule.load_from_checkpoint(path)
    assert torch.equal(outputs(load_qat_checkpoint(path, TinyModule())), outputs(run.module))


@row("trainer.save_checkpoint", "trainer.save_checkpoint(path) after fit", "works; a run resumes from it")
def save_checkpoint(folder: Path) -> None:
    run = fit(folder)
    run.trainer.save_checkpoint(folder / "by_hand.ckpt")
    assert same_state(load_qat_checkpoint(folder / "by_hand.ckpt", TinyModule()), run.module) == []
    qat = callback()
    runner = trainer(folder, qat, max_epochs=4, enable_checkpointing=False)
    module = TinyModule()
    runner.fit(module, ckpt_path=str(folder / "by_hand.ckpt"))
    assert runner.current_epoch == 4
    check(Run(runner, module, qat))


@row(
    "A second fit",
    "trainer.fit(module) again",
    "works; it continues from the prepared network and converts again",
)
def second_fit(folder: Path) -> None:
    run = fit(folder)
    first = run.qat.int8_module
    run.trainer.fit_loop.max_epochs = 4
    run.trainer.fit(run.module)
    assert run.trainer.current_epoch == 4
    assert run.qat.int8_module is not first
    check(run)
