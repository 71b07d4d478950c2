"""The report of a run: what is measured, what is gathered on the way, and that it costs no run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from qat_lightning import QuantizationAwareTraining, convert, prepare
from qat_lightning.base.inputs import Inputs
from qat_lightning.base.sqnr import sqnr
from qat_lightning.cli import report as command
from qat_lightning.fake_quant.phases import set_enabled
from qat_lightning.modes.lowering.reference import floating
from qat_lightning.report import build
from qat_lightning.report.content import Layer, Machine, Network, Report, Score, Speed
from qat_lightning.report.curves import Curves
from qat_lightning.report.findings import findings
from qat_lightning.report.layers import measure_layers
from qat_lightning.report.networks import describe
from tests.networks import Residual, Stubbed, images
from tests.runs import TinyModule, loader, trainer


def prepared(network: nn.Module, x: Tensor, steps: int = 20, **options: Any) -> nn.Module:
    network = prepare(network, **options).train()
    for _ in range(steps):
        network(x)
    return network.eval()


# Layers


@pytest.mark.parametrize("build_network", [Residual, Stubbed])
def test_each_layer_is_compared_in_its_three_forms(build_network: Any) -> None:
    torch.manual_seed(0)
    x = images(16)
    network = prepared(build_network(), x, backend="onednn")
    found = measure_layers(network, convert(network), Inputs((x,), {}))
    assert [layer.name for layer in found] == [
        name for name, module in network.named_modules() if hasattr(module, "weight_fake_quant")
    ]
    for layer in found:
        assert 15 < layer.fake_quant_sqnr < 60
        assert layer.int8_sqnr > layer.fake_quant_sqnr  # int8 is nearer to what was trained than float is
        assert layer.clipped < 0.05
        assert sum(layer.counts) > 0
        assert layer.edges[0] < layer.edges[1]


def test_a_range_that_is_too_narrow_is_told_as_share_clipped_and_as_loss() -> None:
    torch.manual_seed(0)
    x = images(16)
    network = prepared(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), x, backend="onednn")
    wide = measure_layers(network, convert(network), Inputs((x,), {}))
    set_enabled(network, observer=False, fake_quant=True)
    with torch.no_grad():
        network.get_parameter("2.weight").mul_(4)  # after its output's range was observed
    narrow = measure_layers(network, convert(network), Inputs((x,), {}))
    assert wide[1].clipped < 0.01
    assert narrow[1].clipped > 0.2
    assert narrow[1].loss > wide[1].loss + 6
    low, high = narrow[1].grid
    beyond = [
        count
        for count, edge in zip(narrow[1].counts, torch.linspace(*narrow[1].edges, 61).tolist(), strict=False)
        if edge > high or edge < low
    ]
    assert sum(beyond) / sum(narrow[1].counts) == pytest.approx(narrow[1].clipped, abs=0.03)


def test_the_float_form_is_the_network_without_rounding() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 64)
    network = prepared(models.mobilenet_v3_small(num_classes=7), x, steps=2)
    set_enabled(network, observer=False, fake_quant=False)
    with torch.no_grad():
        assert sqnr(network(x), floating(network)(x)) > 100


def test_a_torchvision_network_is_described_with_its_float_parts() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 64)
    network = prepared(models.mobilenet_v3_small(num_classes=7), x, steps=2, keep_float=["classifier.3"])
    told = describe("net", network, convert(network), Inputs((x,), {}))
    assert told.fused["Conv2d+BatchNorm2d+ReLU"] == 5
    assert [text for text in told.floats if text.startswith("classifier.3 (Linear): keep_float")]
    assert 0.9 < told.int8_share < 1
    assert len(told.layers) == 53
    assert network.training is False


# Findings


def layer(name: str = "conv", **values: Any) -> Layer:
    usual: dict[str, Any] = {
        "kind": "Conv2d",
        "fake_quant_sqnr": 30.0,
        "int8_sqnr": 50.0,
        "loss": 1.0,
        "clipped": 0.0,
        "grid": (0.0, 1.0),
        "edges": (0.0, 1.0),
        "counts": (1, 2),
    }
    return Layer(name, **{**usual, **values})


def report(*layers: Layer, backend: str = "onednn", **values: Any) -> Report:
    network = Network("model", {"backend": backend}, {}, (), 1.0, layers)
    usual: dict[str, Any] = {"networks": (network,), "machine": Machine("cpu", ("avx512_vnni",), 2, 2)}
    return Report("title", "2026-01-31 12:00", "last", {}, **{**usual, **values})


def test_nothing_stands_out_of_a_good_run() -> None:
    scores = (Score("float", "PyTorch", {"acc": 0.9}, "val"), Score("int8", "PyTorch", {"acc": 0.899}, "val"))
    speeds = (Speed("float", "PyTorch", 1, 2, 0.1), Speed("int8", "PyTorch", 1, 1, 0.1, 2.0))
    assert findings(report(layer(), scores=scores, speeds=speeds), {}) == ()


def test_each_finding_names_what_to_do() -> None:
    layers = [
        layer("noisy", loss=9.2, fake_quant_sqnr=14.0),
        layer("still good", loss=9.2, fake_quant_sqnr=35.0),
        layer("narrow", clipped=0.034),
        layer("drifting", int8_sqnr=12.0),
        layer("exact", int8_sqnr=math.inf),
    ]
    scores = (Score("float", "PyTorch", {"acc": 0.9}, "val"), Score("int8", "OpenVINO", {"acc": 0.88}, "val"))
    speeds = (
        Speed("float", "ONNX Runtime", 1, 1, 0.1),
        Speed("int8", "ONNX Runtime", 1, 1.25, 0.1, 0.8),
    )
    found = findings(
        report(*layers, backend="x86", scores=scores, speeds=speeds), {"ONNX Runtime": {"HardSigmoid": 29}}
    )
    assert [text.split(":")[0].split(",")[0][:30] for text in found] == [
        "int8 in OpenVINO loses 2.0 poi",
        "Int8 in ONNX Runtime is no fas",
        "Layer noisy loses 9 dB between",
        "Layer narrow clips 3.4% of its",
        "Layer drifting in int8 agrees ",
        "The backend x86 uses 7 bits fo",
    ]
    assert "29 HardSigmoid run in float between int8 layers" in found[1]
    assert "keep_float=['noisy']" in found[2]


def test_speeds_that_were_disturbed_are_told() -> None:
    speeds = (Speed("float", "PyTorch", 1, 2, 1.1), Speed("int8", "PyTorch", 1, 1, 0.1, 2.0))
    (found,) = findings(report(layer(), speeds=speeds), {})
    assert found.startswith("1 of 2 speeds varied by more than 25% between calls")


def test_a_cpu_without_dot_products_is_the_reason_before_all_others() -> None:
    speeds = (Speed("float", "PyTorch", 1, 1, 0.1), Speed("int8", "PyTorch", 1, 1, 0.1, 1.0))
    old = report(speeds=speeds, machine=Machine("old", ("avx2",), 2, 2))
    assert "VNNI" in findings(old, {"PyTorch": {"Mul": 1}})[0]


def test_eight_bits_overflow_on_a_cpu_without_dot_products() -> None:
    old = Machine("old", ("avx2",), 2, 2)
    assert "x64quantprecision" in findings(report(layer(), machine=old), {})[-1]
    assert findings(report(layer(), backend="x86", machine=old), {}) == ()


# The file


def test_a_report_survives_its_file() -> None:
    written = report(layer(int8_sqnr=math.inf), scores=(Score("float", "PyTorch", {"a": 0.5}, "val"),))
    assert Report.from_json(written.to_json()) == written
    assert "Infinity" not in written.to_json()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "machine": 3}'])
def test_another_file_is_no_report(text: str) -> None:
    with pytest.raises(ValueError, match="not a report of qat-lightning"):
        Report.from_json(text)


def test_a_report_of_a_later_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version 99"):
        Report.from_json(report().to_json().replace('"version": 1', '"version": 99'))


# The callback


class Scored(TinyModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_accuracy", (logits.argmax(1) == batch[1]).float().mean())


def content(folder: Path) -> Report:
    return Report.from_json((folder / "report.json").read_text())


def test_a_run_ends_with_a_page_a_file_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    qat = QuantizationAwareTraining(
        export=["torch", "onnx", "openvino"], report=True, output_dir=tmp_path, freeze_observers_at=2
    )
    module = Scored(lr=0.01)  # the ranges that freeze have settled
    run = trainer(tmp_path, qat, max_epochs=4, enable_checkpointing=False)
    run.fit(module)
    found = content(tmp_path)
    assert [(score.network, score.runtime) for score in found.scores] == [
        ("float", "PyTorch"),
        ("fake-quant", "PyTorch"),
        ("int8", "PyTorch"),
        ("int8", "ONNX Runtime"),
        ("int8", "OpenVINO"),
    ]
    (own,) = trainer(tmp_path).validate(module, verbose=False)
    assert found.scores[1].metrics == pytest.approx(own)
    assert found.scores[0].metrics["val_accuracy"] < 0.7  # untrained
    (int8,) = trainer(tmp_path).validate(qat.int8_module, verbose=False)
    assert found.scores[2].metrics == pytest.approx(int8)
    assert found.scores[3].bytes == (tmp_path / "int8.onnx").stat().st_size
    assert {(speed.runtime, speed.batch) for speed in found.speeds} == {
        (runtime, batch) for runtime in ("PyTorch", "ONNX Runtime", "OpenVINO") for batch in (1, 8, 32)
    }
    assert [epoch.epoch for epoch in found.epochs] == [0, 1, 2, 3]
    assert found.epochs[-1].metrics["val_loss"] == pytest.approx(own["val_loss"])
    assert [(mark.epoch, mark.what) for mark in found.marks] == [(2, "observers frozen")]
    (network,) = found.networks
    assert network.name == "model"
    assert len(network.layers) == 3
    page = (tmp_path / "report.html").read_text()
    assert all(each.name in page for each in network.layers)
    assert "OpenVINO" in capsys.readouterr().out
    assert run.validate(module, verbose=False) == [own]  # the module is as it was


def test_without_validation_there_are_layers_and_speeds(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(report=True, output_dir=tmp_path, preflight=False)
    run = trainer(tmp_path, qat, max_epochs=1, limit_val_batches=0, enable_checkpointing=False)
    run.fit(TinyModule(), train_dataloaders=loader())
    found = content(tmp_path)
    assert found.networks[0].layers
    assert found.speeds


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_the_curves_of_a_resumed_run_are_whole(tmp_path: Path) -> None:
    def run(epochs: int, checkpoint: str | None = None) -> QuantizationAwareTraining:
        qat = QuantizationAwareTraining(report=True, output_dir=tmp_path, freeze_observers_at=1)
        saving = ModelCheckpoint(tmp_path, save_last=True)
        trainer(tmp_path, qat, saving, max_epochs=epochs).fit(
            Scored(), ckpt_path=checkpoint, weights_only=True
        )
        return qat

    run(2)
    run(3, str(tmp_path / "last.ckpt"))
    found = content(tmp_path)
    assert [epoch.epoch for epoch in found.epochs] == [0, 1, 2]
    assert [(mark.epoch, mark.what) for mark in found.marks] == [(1, "observers frozen")]
    # The module that a run is resumed with need not hold the weights that it began with.
    assert [score.network for score in found.scores] == ["fake-quant", "int8"]


def test_a_second_fit_has_curves_of_its_own(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(output_dir=tmp_path)
    module = Scored()
    for epochs in (2, 1):
        trainer(tmp_path, qat, max_epochs=epochs, enable_checkpointing=False).fit(module)
        assert [each.epoch for each in qat.curves.epochs] == list(range(epochs))


def test_a_report_that_fails_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(build, "write", fail)
    qat = QuantizationAwareTraining(report=True, output_dir=tmp_path)
    with pytest.warns(UserWarning, match="report could not be made: no space left"):
        trainer(tmp_path, qat, max_epochs=1, enable_checkpointing=False).fit(TinyModule())
    assert (tmp_path / "int8.pt").is_file()
    assert qat.int8_module is not None


def test_a_dry_run_has_no_report(tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(report=True, output_dir=tmp_path)
    trainer(tmp_path, qat, fast_dev_run=True).fit(TinyModule())
    assert not list(tmp_path.glob("report.*"))


def test_report_is_a_switch() -> None:
    with pytest.raises(TypeError, match="report must be True or False, but received 'yes'"):
        QuantizationAwareTraining(report="yes")  # type: ignore[arg-type]


# qat-report


def test_the_page_is_made_again_from_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text(report(layer("stem")).to_json())
    command.main([str(tmp_path)])
    assert "stem" in (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in capsys.readouterr().out


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no config\.yaml"):
        command.main([str(tmp_path)])


def test_curves_keep_the_last_word_of_an_epoch() -> None:
    curves = Curves()
    curves.record(0, {"loss": torch.tensor(2.0), "image": torch.zeros(3)}, 0.1)
    curves.record(0, {"loss": torch.tensor(1.0)}, 0.1)
    curves.mark(0, "observers frozen")
    curves.mark(3, "observers frozen")
    again = Curves()
    again.load_state_dict(curves.state_dict())
    assert [each.metrics for each in again.epochs] == [{"loss": 1.0, "learning rate": 0.1}]
    assert [(each.epoch, each.what) for each in again.marks] == [(0, "observers frozen")]
