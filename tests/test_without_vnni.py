"""CPUs without VNNI, whose int8 kernels overflow where both factors fill their byte."""

from __future__ import annotations

import logging
import platform
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from qat_lightning import (
    QuantizationAwareTraining,
    convert,
    export_onnx,
    load_int8,
    load_runtime,
    prepare,
    save_int8,
)
from qat_lightning.base import cpu
from qat_lightning.tasks.models import DigitsCNN
from tests.networks import images, sqnr, train_steps
from tests.runs import TinyModule, trainer
from tests.trained import digits, trained_digits_network


@pytest.fixture(autouse=True)
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU is taken for one without."""
    monkeypatch.setattr(cpu, "overflows", lambda: True)


def test_which_cpus_overflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    said = tmp_path / "cpuinfo"
    monkeypatch.setattr(cpu, "_CPUINFO", said)
    for machine, flags, overflows in (
        ("x86_64", "avx2 avx512f", True),
        ("AMD64", "avx2 avx_vnni", False),
        ("x86_64", "avx512_vnni", False),
        ("aarch64", "asimd", False),
    ):
        said.write_text(f"flags : {flags}\n")
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert cpu.overflows() == overflows


def test_int8_of_eight_bits_follows_fake_quant_and_reloads(tmp_path: Path) -> None:
    prepared = trained_digits_network(backend="onednn")
    x = digits()[0][1400:]
    int8 = convert(prepared)
    with torch.no_grad():
        assert sqnr(prepared(x), int8(x)) > 44
    path = save_int8(int8, tmp_path / "int8.pt")
    assert torch.equal(load_int8(path, DigitsCNN())(x), int8(x))


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv3d])
def test_other_convolutions_still_convert(layer: type[nn.Conv1d | nn.Conv3d]) -> None:
    prepared = prepare(nn.Sequential(layer(3, 4, 3), nn.ReLU()), backend="onednn").train()
    x = torch.randn(2, 3, *[8] * (1 if layer is nn.Conv1d else 3))
    prepared(x)
    assert sqnr(prepared.eval()(x), convert(prepared)(x)) > 20


def test_an_onnx_file_of_eight_bits_does_not_overflow_here(tmp_path: Path) -> None:
    prepared = trained_digits_network(backend="onednn")
    x = digits()[0][1400:]
    path = export_onnx(prepared, tmp_path / "int8.onnx", (x[:8],), min_sqnr=44)
    with torch.no_grad():
        assert sqnr(prepared(x), load_runtime(path)(x)) > 44


def test_a_shared_weight_falls_back_to_the_runtimes_defaults(tmp_path: Path) -> None:
    """ONNX Runtime cannot turn it into unsigned bytes twice."""
    layer = nn.Conv2d(3, 3, 1)
    prepared = prepare(nn.Sequential(layer, nn.ReLU(), layer), backend="onednn")
    train_steps(prepared, ((x := images(),), {}))
    path = export_onnx(prepared, tmp_path / "int8.onnx", (x,), min_sqnr=0)
    assert load_runtime(path)(x).shape == (16, 3, 12, 12)


def test_every_file_can_be_read_with_sums_in_32_bits(tmp_path: Path) -> None:
    """The option fails on graphs in which weights of equal size share a zero point."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
    prepared = prepare(network, backend="onednn")
    train_steps(prepared, ((x := images(),), {}))
    path = export_onnx(prepared, tmp_path / "int8.onnx", (x,))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    (found,) = onnxruntime.InferenceSession(path, options).run(None, {"input": x.numpy()})
    with torch.no_grad():
        assert sqnr(prepared(x), torch.from_numpy(found)) > 40


@pytest.mark.parametrize(("backend", "said"), [("onednn", 1), ("qnnpack", 1), ("x86", 0)])
def test_a_run_says_so_once(
    backend: str, said: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    qat = QuantizationAwareTraining(backend=backend)
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, qat, max_epochs=1, fast_dev_run=True).fit(TinyModule())
    assert [message.count("no VNNI") for message in caplog.messages].count(1) == said
