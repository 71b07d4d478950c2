"""The accuracy target of a run: what stays float, and that it does in every run that goes on from it."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models

from qat_lightning import AccuracyTarget, Distillation, RecipeMismatchError, TargetError, convert
from qat_lightning.base.sqnr import sqnr
from qat_lightning.quantize.floating import is_int8
from qat_lightning.quantize.recipe import recipe_of
from qat_lightning.run.parts import accuracy_target
from tests.networks import CLASSES, same_state
from tests.processes import run_all
from tests.ruined import StubbedRow, ruin_weight, seeded
from tests.runs import dataset, trainer
from tests.target_runs import DROP, STEPS, Faithful, bad, callback, fit, fresh, good, kept
from tests.test_lightning_modules import Loose
from tests.test_resume import Crash, CrashAt

# A resumed run writes beside the first one's checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")


def targets(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Target")]


# What stays float


def test_the_bad_layer_stays_float(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = bad()
    with caplog.at_level(logging.INFO):
        qat = fit(tmp_path, module, qat=callback(convert="last"))
    assert kept(module) == ("third.0",)
    (line,) = targets(caplog)
    assert "in float and 0." in line
    assert "with third.0 float it is 0.9" in line
    int8: Any = qat.int8_module
    assert [is_int8(int8.model.get_submodule(f"{name}.0")) for name in ("second", "third")] == [True, False]
    x, expected = next(iter(module.own))
    module.eval()
    with torch.no_grad():
        assert sqnr(module(x), int8(x)) > 30
        assert sqnr(expected, int8(x)) > 25


def test_names_are_added_to_keep_float_in_eager_mode(tmp_path: Path) -> None:
    module = Faithful(ruin_weight(seeded(StubbedRow)))
    fit(tmp_path, module, qat=callback(keep_float=["first"]), max_epochs=1)
    assert kept(module) == ("first", "third.0")


def test_without_need_the_run_is_the_one_without_target(tmp_path: Path) -> None:
    modules = []
    for drop in (None, DROP):
        module = good()
        torch.manual_seed(3)
        fit(tmp_path / str(drop), module, qat=callback(None if drop is None else AccuracyTarget(drop)))
        modules.append((module, torch.rand(1).item()))
    assert kept(modules[1][0]) == ()
    assert same_state(modules[0][0], modules[1][0]) == []
    assert modules[0][1] == modules[1][1]


def test_a_second_fit_goes_on_and_another_module_is_searched(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    qat, module = callback(), bad()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            fit(tmp_path, module, qat=qat, max_epochs=1)
    assert len(targets(caplog)) == 1
    assert kept(module) == ("third.0",)
    other = good()
    fit(tmp_path, other, qat=qat, max_epochs=1)
    assert kept(other) == ()
    with pytest.raises(ValueError, match="is prepared already"):
        fit(tmp_path, module, qat=qat, max_epochs=1)


def test_a_loss_that_a_checkpoint_monitors(tmp_path: Path) -> None:
    """Less of it is better, and the limit of the validation is the search's."""

    class Lossy(Faithful):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert batch_idx < 2
            self.log("val_loss", F.mse_loss(self(batch[0]), batch[1]) / batch[1].var())

    module = Lossy(bad().model)
    monitor = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer(tmp_path, callback(AccuracyTarget(1)), monitor, max_epochs=1, limit_val_batches=2).fit(module)
    assert kept(module) == ("third.0",)


class Wide(Faithful):
    """Images that a torchvision network does not reduce to nothing."""

    def __init__(self, network: Any) -> None:
        x = F.interpolate(dataset(16).tensors[0], 32)
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0
        network.train()(x)  # statistics that are those of the data
        super().__init__(network.eval())
        with torch.no_grad():
            self.own = DataLoader(TensorDataset(x, network(x)), batch_size=8)
        network.train()


@pytest.mark.slow
def test_resnet18(tmp_path: Path) -> None:
    network = seeded(lambda: models.resnet18(num_classes=CLASSES))
    block = network.layer1[0]
    with torch.no_grad():  # a channel that is always 0, and whose weights take the whole grid
        block.bn1.weight[0] = 0
        block.bn1.bias[0] = -1
        block.conv2.weight[:, 0] = 3e4
    module = Wide(network)
    qat = fit(
        tmp_path, module, qat=callback(AccuracyTarget(50), backend="onednn", convert="last"), max_epochs=1
    )
    assert kept(module) == ("layer1.0.conv2",)
    int8: Any = qat.int8_module
    x, _ = next(iter(module.own))
    module.eval()
    with torch.no_grad():
        assert sqnr(module(x), int8(x)) > 15


# Runs that go on


@pytest.mark.parametrize("announced", [False, True])
def test_a_resumed_run_has_the_layers_of_the_first_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, announced: bool
) -> None:
    """Whatever weights it is built with: a search on them would find nothing to keep."""
    whole, crashed, resumed = bad(), bad(), fresh()
    resumed.own = whole.own
    for folder, module in ((tmp_path / "whole", whole), (tmp_path, crashed)):
        torch.manual_seed(3)
        with pytest.raises(Crash) if module is crashed else nullcontext():
            fit(folder, module, *[CrashAt(STEPS + 2)] * (module is crashed))
    torch.manual_seed(7)
    path = tmp_path / "epoch=0.ckpt"
    caplog.clear()
    with caplog.at_level(logging.INFO):
        where: dict[str, Any] = {"announced" if announced else "ckpt_path": path}
        qat = fit(tmp_path, resumed, **where)
    assert len(targets(caplog)) == (0 if announced else 1)
    assert "Kept float by the run that is resumed: third.0" in caplog.messages
    assert kept(resumed) == ("third.0",)
    assert same_state(whole, resumed) == []
    assert qat.state_dict()["target"] == {"max_drop": DROP, "kept": ["third.0"]}
    assert not resumed._load_state_dict_pre_hooks


def test_a_resumed_run_does_not_fail_where_its_fresh_weights_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path, bad(), max_epochs=1)

    def fail(*_: Any) -> tuple[str, ...]:
        raise TargetError("not on these weights")

    monkeypatch.setattr(accuracy_target, "search", fail)
    resumed = fresh()
    fit(tmp_path, resumed, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert kept(resumed) == ("third.0",)


def test_parameters_stay_those_of_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that are prepared anew have them still, whoever else holds them."""
    fit(tmp_path, bad(), max_epochs=1)
    monkeypatch.setattr(accuracy_target, "search", lambda *_: ("first", "second"))
    resumed = bad()
    parameters = set(resumed.parameters())
    fit(tmp_path, resumed, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert kept(resumed) == ("third.0",)
    assert set(resumed.parameters()) == parameters


def test_teacher_schedule_and_int8_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them go on with networks that are prepared anew."""
    others: dict[str, Any] = {
        "distillation": Distillation("self"),
        "fake_quant_from": 1,
        "int8_val_every_n_epochs": 1,
        "convert": "last",
    }
    with pytest.raises(Crash):
        fit(tmp_path, bad(), CrashAt(STEPS + 2), qat=callback(**others))
    monkeypatch.setattr(accuracy_target, "search", lambda *_: ("first", "second"))
    resumed = bad()
    qat = fit(tmp_path, resumed, qat=callback(**others), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert kept(resumed) == ("third.0",)
    last = qat.curves.epochs[-1].metrics
    assert last["val_int8/fidelity"] > 0.9
    assert last["train/distillation"] > 0


def test_averaged_weights_are_resumed(tmp_path: Path) -> None:
    def averaging() -> EMAWeightAveraging:
        return EMAWeightAveraging(decay=0.9)

    fit(tmp_path, bad(), averaging(), max_epochs=1)
    resumed = fresh()
    resumed.own = bad().own
    fit(tmp_path, resumed, averaging(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert kept(resumed) == ("third.0",)
    with torch.no_grad():
        x, expected = next(iter(resumed.own))
        assert sqnr(expected, convert(resumed)(x)) > 25


@pytest.mark.parametrize(("first", "second"), [(None, 1.0), (DROP, 1.0)])
def test_another_target_has_no_effect_on_a_resumed_run(
    tmp_path: Path, first: float | None, second: float
) -> None:
    fit(tmp_path, bad(), qat=callback(None if first is None else AccuracyTarget(first)), max_epochs=1)
    resumed = bad()
    with pytest.warns(UserWarning, match=f"started with max_drop={first} and keeps its layers"):
        fit(tmp_path, resumed, qat=callback(AccuracyTarget(second)), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert kept(resumed) == (() if first is None else ("third.0",))


def test_without_a_target_the_layers_have_to_be_named(tmp_path: Path) -> None:
    fit(tmp_path, bad(), max_epochs=1)
    path = tmp_path / "epoch=0.ckpt"
    with pytest.raises(RecipeMismatchError, match=r"only the network has \['third\.0'\].*accuracy_target"):
        fit(tmp_path, bad(), qat=callback(None), ckpt_path=path)
    named = callback(None, keep_float=["third.0"])
    fit(tmp_path, bad(), qat=named, ckpt_path=path)


def test_a_module_with_layers_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be prepared anew, so that it goes on only where the search finds the same again."""

    def run(found: tuple[str, ...], ckpt_path: Path | None = None, **options: Any) -> Loose:
        monkeypatch.setattr(accuracy_target, "search", lambda *_: found)
        saved = ModelCheckpoint(tmp_path, monitor="accuracy", mode="max", filename="{epoch}")
        module = Loose()
        runner = trainer(tmp_path, callback(**options), saved, max_epochs=1 if ckpt_path is None else 2)
        runner.fit(module, ckpt_path=ckpt_path)
        return module

    first = run(("body.0",))
    recipe = recipe_of(first)
    assert recipe is not None
    assert recipe.keep_float == ("body.0",)
    path = tmp_path / "epoch=0.ckpt"
    run(("body.0",), path)
    with pytest.raises(
        RecipeMismatchError, match=r"Pass keep_float=\['body\.0'\] instead of accuracy_target"
    ):
        run((), path)
    run((), path, keep_float=["body.0"], target=None)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_is_tested_with_a_fresh_module(tmp_path: Path) -> None:
    fit(tmp_path, bad(), max_epochs=1)
    module = fresh()
    trainer(tmp_path, callback()).validate(module, ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert kept(module) == ("third.0",)


# Several processes


@pytest.mark.slow
def test_two_processes_keep_what_the_first_finds(tmp_path: Path) -> None:
    run_all([(["-m", "tests.target_script", str(tmp_path)], {})], tmp_path)
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert [each["kept"] for each in results] == [("third.0",)] * 2
    assert [each["resumed"] for each in results] == [("third.0",)] * 2
    assert same_state(results[0]["state"], results[1]["state"]) == []
    assert results[0]["failure"].startswith("TargetError: Int8 must lose at most 0 points")
    assert results[1]["failure"] == results[0]["failure"]
    assert results[0]["error"].startswith("MisconfigurationException: An accuracy target takes one")
    assert results[1]["error"].startswith("RankError: Rank 0 failed while searching for the layers")
