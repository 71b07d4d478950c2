"""The files that a run ends with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from qat_lightning import (
    ConversionError,
    MissingExtraError,
    QuantizationAwareTraining,
    load_qat_checkpoint,
    load_runtime,
)
from qat_lightning.base.sqnr import sqnr
from tests.networks import CLASSES, Residual
from tests.runs import TinyModule, dataset, trainer


def x() -> Tensor:
    return dataset(16).tensors[0]


def test_every_format_has_a_file_of_the_weights_that_were_converted(tmp_path: Path) -> None:
    module = TinyModule(Residual())
    qat = QuantizationAwareTraining(
        export=["torch", "onnx", "openvino"], preflight=False, output_dir=tmp_path
    )
    trainer(tmp_path, qat, max_epochs=2, enable_checkpointing=False).fit(module)
    assert [path.name for path in qat.exported] == ["int8.pt", "int8.onnx", "int8.xml"]
    assert qat.int8_path == tmp_path / "int8.pt"
    module.eval()
    with torch.no_grad():
        expected = module(x())
        for path in qat.exported:
            shipped = qat.shipped(TinyModule(Residual()), path)
            assert sqnr(expected, shipped(x())) > 30
            (scores,) = trainer(tmp_path).test(shipped, verbose=False)
            assert 0 <= scores["test_accuracy"] <= 1


@pytest.mark.parametrize("convert", ["best", pytest.param("last", marks=pytest.mark.slow)])
def test_a_graph_says_what_is_known_of_its_weights(tmp_path: Path, convert: str) -> None:
    qat = QuantizationAwareTraining(
        export=["onnx", "openvino"], preflight=False, output_dir=tmp_path, convert=convert
    )
    saving = ModelCheckpoint(tmp_path, monitor="val_loss")
    run = trainer(tmp_path, qat, saving, max_epochs=2)
    run.fit(TinyModule())
    assert saving.best_model_score is not None
    best, last = float(saving.best_model_score), float(run.callback_metrics["val_loss"])
    said = {entry.key: entry.value for entry in onnx.load(tmp_path / "int8.onnx").metadata_props}
    metrics = json.loads(said["qat_lightning.metrics"])
    assert metrics["val_loss"] == pytest.approx(best if convert == "best" else last)
    assert "qat_lightning.quantize.recipe" in said
    assert "val_loss" in (tmp_path / "int8.xml").read_text()


class Pair(TinyModule):
    """Two networks, the second of which takes a keyword."""

    def __init__(self) -> None:
        super().__init__(Residual())
        self.second = Scaled()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.model(x), scale=x.mean((1, 2, 3)).view(-1, 1))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(CLASSES, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return self.layers(x) * scale


class Loose(TinyModule):
    """A network itself."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("build", "names"), [(Pair, ["int8.model.onnx", "int8.second.onnx"]), (Loose, ["int8.onnx"])]
)
def test_networks_by_their_names_and_by_their_real_inputs(
    build: type[TinyModule], names: list[str], tmp_path: Path
) -> None:
    module = build()
    qat = QuantizationAwareTraining(export=["onnx"], output_dir=tmp_path)
    trainer(tmp_path, qat, max_epochs=1, enable_checkpointing=False).fit(module)
    assert [path.name for path in qat.exported] == names
    assert qat.int8_path is None
    shipped: Any = build()
    for path in qat.exported:
        shipped = qat.shipped(shipped, path)
    with torch.no_grad():
        assert sqnr(module.eval()(x()), shipped(x())) > 20


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_that_is_resumed_after_its_last_step(tmp_path: Path) -> None:
    def run(ckpt_path: Path | None) -> QuantizationAwareTraining:
        qat = QuantizationAwareTraining(export=["onnx"], output_dir=tmp_path)
        last = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
        trainer(tmp_path, qat, last, max_epochs=1).fit(TinyModule(), ckpt_path=ckpt_path, weights_only=True)
        return qat

    (path,) = run(None).exported
    expected = load_runtime(path)(x())
    path.unlink()
    assert run(tmp_path / "last.ckpt").exported == [path]
    assert torch.equal(load_runtime(path)(x()), expected)


def test_a_failing_export_costs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qat_lightning.export.onnx.write_graph", fail)
    qat = QuantizationAwareTraining(export=["torch", "onnx"], output_dir=tmp_path)
    with pytest.raises(ConversionError, match=r"No space left.*The trained weights are safe"):
        trainer(tmp_path, qat, max_epochs=1).fit(TinyModule())
    assert list((tmp_path / "checkpoints").glob("*.ckpt"))
    assert not (tmp_path / "trained.ckpt").exists()
    assert (tmp_path / "int8.pt").is_file()
    assert not list(tmp_path.rglob("*.onnx"))

    module = TinyModule()
    with pytest.raises(
        ConversionError, match=r"no checkpoint, so the trained weights were written to .*ckpt"
    ):
        trainer(tmp_path, qat, max_epochs=1, enable_checkpointing=False).fit(module)
    rescued = load_qat_checkpoint(tmp_path / "trained.ckpt", TinyModule())
    assert torch.equal(rescued(x()), module.eval()(x()))

    (tmp_path / "trained.ckpt").unlink()
    monkeypatch.setattr("qat_lightning.run.conversion.replacing", fail)
    with pytest.raises(ConversionError, match=r"could not be written either .*No space left.*torch.save"):
        trainer(tmp_path, qat, max_epochs=1, enable_checkpointing=False).fit(TinyModule())


def test_formats_are_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"export takes torch, onnx, openvino, but received 'onx'.*'onnx'"):
        QuantizationAwareTraining(export=["onx"])
    with pytest.raises(TypeError, match="must be a list of formats"):
        QuantizationAwareTraining(export="onnx")
    monkeypatch.setattr("qat_lightning.export.extras.find_spec", lambda name: None)
    qat = QuantizationAwareTraining(export=["openvino"])
    with pytest.raises(MissingExtraError, match=r'pip install "qat-lightning\[onnx\]"'):
        trainer(tmp_path, qat, max_epochs=1).fit(TinyModule())
    trainer(tmp_path, QuantizationAwareTraining(), fast_dev_run=True).fit(TinyModule())
