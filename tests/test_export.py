from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from qat_lightning import ConversionError, MissingExtraError, export_onnx, prepare
from qat_lightning.modes.lowering.reference import reference
from tests.networks import CASES, Case, leaves, sqnr, train_steps
from tests.trained import digits, trained_digits_network


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # or 8 bits overflow without VNNI
    session = onnxruntime.InferenceSession(path, options)
    names = [node.name for node in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(np.asarray(value)) for value in session.run(None, feed)]


@pytest.mark.parametrize(("backend", "decibels"), [("x86", 38), ("onednn", 44)])  # 7 bits and 8
def test_trained_network_follows_fake_quant_in_onnx_runtime(
    tmp_path: Path, backend: str, decibels: float
) -> None:
    prepared = trained_digits_network(backend=backend)
    images = digits()[0][1400:]
    path = export_onnx(prepared, tmp_path / "digits.onnx", (images[:8],), min_sqnr=decibels)

    with torch.no_grad():
        expected = prepared(images)
    (outputs,) = run(path, images)  # another batch size than the example's

    assert sqnr(expected, outputs) > decibels
    assert (outputs.argmax(1) == expected.argmax(1)).float().mean() > 0.99


def test_weights_are_int8_in_the_file(tmp_path: Path) -> None:
    prepared = trained_digits_network(backend="x86")
    path = export_onnx(prepared, tmp_path / "digits.onnx", (digits()[0][:4],))

    model = onnx.load(path)
    onnx.checker.check_model(model)
    int8 = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    big_floats = [
        t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1
    ]
    assert len(int8) == 4
    assert big_floats == []
    weights = sum(p.numel() for p in prepared.parameters() if p.ndim > 1)
    assert path.stat().st_size < weights + 60_000  # a byte a weight, and the graph around them


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_graph_rounds_as_fake_quant_does(case: Case) -> None:
    prepared = prepare(case.build(), mode=case.mode)
    args, kwargs = case.inputs()
    train_steps(prepared, (args, kwargs))
    prepared.eval()
    with torch.no_grad():
        expected = leaves(prepared(*args, **kwargs))
        found = leaves(reference(prepared)(*args, **kwargs))
    for want, got in zip(expected, found, strict=True):
        assert sqnr(want, got) > 60


def test_lightning_module_exports_by_its_example_input_array(tmp_path: Path) -> None:
    prepared: Any = trained_digits_network(backend="onednn")
    prepared.example_input_array = digits()[0][:4]
    path = export_onnx(prepared, tmp_path / "digits.onnx")
    (outputs,) = run(path, digits()[0][:3])
    assert outputs.shape == (3, 10)


def test_export_needs_example_inputs(tmp_path: Path) -> None:
    prepared = trained_digits_network(backend="onednn")
    with pytest.raises(ValueError, match=r"example_inputs=\(batch,\)"):
        export_onnx(prepared, tmp_path / "digits.onnx")


def test_float_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes a network that `prepare` made"):
        export_onnx(nn.Linear(2, 2), tmp_path / "a.onnx", (torch.randn(1, 2),))


def test_network_without_data_is_refused(tmp_path: Path) -> None:
    prepared = prepare(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ConversionError, match="no batch has passed"):
        export_onnx(prepared, tmp_path / "a.onnx", (torch.randn(1, 2),))


def test_file_that_computes_something_else_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = trained_digits_network(backend="onednn")
    stranger = trained_digits_network(backend="x86")
    with torch.no_grad():
        for parameter in stranger.parameters():
            parameter.mul_(-1)
    monkeypatch.setattr("qat_lightning.export.onnx.reference", lambda _: reference(stranger))
    with pytest.raises(ConversionError, match="does not compute what was trained"):
        export_onnx(prepared, tmp_path / "a.onnx", (digits()[0][:4],))


def test_absent_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat_lightning.export.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "qat-lightning\[onnx\]"'):
        export_onnx(nn.Linear(2, 2), tmp_path / "a.onnx", (torch.randn(1, 2),))
