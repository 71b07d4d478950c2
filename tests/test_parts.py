"""The callback is made of parts: what they are told, when, and in which order."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

import qat_lightning
from qat_lightning import ModuleOptions, PostTrainingQuantization, QuantizationAwareTraining, prepare
from qat_lightning.quantize.options import Settings
from qat_lightning.run.part import Part
from tests.networks import Residual
from tests.runs import TinyModule, trainer

HOOKS = [name for name, value in vars(Part).items() if inspect.isfunction(value)]


class Told(Part):
    """Notes which of its hooks were called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name in HOOKS:
            self.calls.append(name)
        return super().__getattribute__(name)


def run(folder: Path, *, epochs: int = 1, ckpt_path: Path | None = None) -> list[str]:
    told, qat = Told(), QuantizationAwareTraining()
    qat._parts.append(told)
    saved = ModelCheckpoint(folder, filename="saved", enable_version_counter=False)
    runner = trainer(folder, qat, saved, max_epochs=epochs, num_sanity_val_steps=0)
    module = TinyModule()
    runner.fit(module, ckpt_path=ckpt_path)
    runner.test(module, verbose=False)
    return told.calls


def test_a_part_is_told_of_a_run_in_order(tmp_path: Path) -> None:
    calls = run(tmp_path)
    once = list(dict.fromkeys(calls))
    assert once == [
        "check",
        "before_prepare",
        "after_prepare",
        "on_fit_start",
        "on_train_start",
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
        "on_validation_start",
        "on_evaluation_start",
        "on_validation_epoch_end",
        "on_evaluation_end",
        "on_validation_end",
        "on_train_epoch_end",
        "state_dict",
        "on_save_checkpoint",
        "on_train_end",
        "on_fit_end",
        "after_conversion",
    ]
    assert calls[-2:] == ["on_evaluation_start", "on_evaluation_end"]  # of the test
    with pytest.warns(UserWarning, match="Checkpoint directory"):  # Lightning's
        resumed = run(tmp_path, epochs=2, ckpt_path=tmp_path / "saved.ckpt")
    assert {*calls, *resumed} == {*HOOKS} - {"on_exception"}


def test_a_part_is_told_of_an_exception(tmp_path: Path) -> None:
    class Fails(TinyModule):
        def training_step(self, *_: Any) -> Any:
            raise RuntimeError("no")

    told, qat = Told(), QuantizationAwareTraining()
    qat._parts.append(told)
    with pytest.raises(RuntimeError, match="no"):
        trainer(tmp_path, qat, max_epochs=1).fit(Fails())
    assert told.calls[-1] == "on_exception"


def test_the_options_and_the_settings_are_the_same_names() -> None:
    assert [*ModuleOptions.__annotations__] == [
        *(name for name in Settings.__dataclass_fields__ if name != "modules"),
        "modules",
    ]


@pytest.mark.parametrize("kind", [QuantizationAwareTraining, PostTrainingQuantization])
def test_an_argument_that_is_not_there(kind: Any) -> None:
    with pytest.raises(TypeError, match=rf"{kind.__name__} takes no argument 'bakend'\. Nearest: 'backend'"):
        kind(bakend="x86")
    with pytest.raises(TypeError, match="prepare takes no argument 'modules'"):
        prepare(Residual(), modules=["model"])  # type: ignore[call-arg]


def test_everything_public_is_documented() -> None:
    for name in qat_lightning.__all__:
        assert inspect.getdoc(getattr(qat_lightning, name)), name
