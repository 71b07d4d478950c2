"""Exported files in the runtimes they are for, against what was trained."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import DeQuantStub, QuantStub
from torchvision import models

from qat_lightning import (
    ConversionError,
    MissingExtraError,
    export_onnx,
    export_openvino,
    load_runtime,
    prepare,
)
from qat_lightning.base.sqnr import sqnr
from qat_lightning.modes.lowering.reference import reference
from tests.networks import CLASSES, Residual, TwoInputs, images, leaves, train_steps
from tests.runs import TinyModule, trainer


class Nested(nn.Module):
    """Takes nested inputs, by name too, and returns nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)

    def forward(self, batch: dict[str, Any], extra: Tensor) -> dict[str, Any]:
        image = self.conv(batch["image"]).mean((2, 3))
        facts = self.fc(batch["facts"][0] + extra)
        return {"logits": image + facts, "parts": (image, [facts])}


class Island(nn.Module):
    """Int8, float, int8."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh())
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).relu()).mean((2, 3)))


class StubbedIsland(Island):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(super().forward(self.quant(x)))


def pictures(count: int = 4) -> tuple[Tensor]:
    return (torch.randn(count, 3, 64, 64),)


@dataclass(frozen=True)
class Case:
    """A network to export.

    Attributes:
        name: Of the test.
        build: Makes the float network.
        inputs: Its arguments.
        decibels: Least agreement with fake-quant in a runtime's own int8 kernels.
        options: For `prepare`.
        slow: Whether it takes many seconds.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any] = pictures
    decibels: float = 20
    options: dict[str, Any] = field(default_factory=dict)
    slow: bool = False


def torchvision(name: str, **options: Any) -> Case:
    build: Any = getattr(models, name)
    return Case(name, lambda: build(num_classes=CLASSES), slow=True, **options)


def quantizable(name: str) -> Case:
    build: Any = getattr(models.quantization, name)
    return Case(f"{name}-eager", lambda: build(num_classes=CLASSES), slow=True)


CASES = [
    *map(torchvision, ("resnet18", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0")),
    *map(quantizable, ("resnet18", "mobilenet_v2", "mobilenet_v3_large")),
    Case("two_inputs", TwoInputs, lambda: {"x": images(4), "extra": torch.randn(4, 5)}),
    Case(
        "nested",
        Nested,
        lambda: {"batch": {"image": images(4), "facts": [torch.randn(4, 5)]}, "extra": torch.randn(4, 5)},
    ),
    Case("island", Island, lambda: (images(4),), options={"keep_float": ["middle"]}),
    Case("island-eager", StubbedIsland, lambda: (images(4),), options={"keep_float": ["middle"]}, slow=True),
]
MARKED = [pytest.param(c, marks=[pytest.mark.slow] if c.slow else [], id=c.name) for c in CASES]


def call(network: nn.Module, inputs: Any) -> Any:
    with torch.no_grad():
        return network(**inputs) if isinstance(inputs, dict) else network(*inputs)


def trained(case: Case) -> nn.Module:
    prepared = prepare(case.build(), **case.options)
    inputs = case.inputs()
    train_steps(prepared, ((), inputs) if isinstance(inputs, dict) else (inputs, {}))
    return prepared.eval()


@pytest.mark.parametrize("case", MARKED)
def test_an_exported_network_follows_fake_quant_in_both_runtimes(case: Case, tmp_path: Path) -> None:
    prepared = trained(case)
    inputs = case.inputs()
    graph = export_onnx(prepared, tmp_path / "int8.onnx", inputs)
    onnx.checker.check_model(onnx.load(graph), full_check=True)
    ir = export_openvino(prepared, tmp_path / "int8.xml", inputs)
    expected = call(prepared, inputs)
    for path in (graph, ir):
        found = call(load_runtime(path), inputs)
        assert torch.utils._pytree.tree_structure(found) == torch.utils._pytree.tree_structure(expected)
        for want, got in zip(leaves(expected), leaves(found), strict=True):
            assert sqnr(want, got) > case.decibels


def test_the_graph_is_what_a_runtime_wants(tmp_path: Path) -> None:
    prepared = prepare(Residual())
    train_steps(prepared, ((images(),), {}))
    path = export_onnx(prepared, tmp_path / "int8.onnx", (images(),), metadata={"accuracy": "0.99"})
    model = onnx.load(path)
    makers = {output: node for node in model.graph.node for output in node.output}
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["GlobalAveragePool"] == 1
    assert not kinds["Clip"] + kinds["ReduceMean"] + kinds["Identity"]
    for node in model.graph.node:
        above = makers.get(node.input[0])
        if node.op_type == "QuantizeLinear" and above is not None and above.op_type == "DequantizeLinear":
            assert list(above.input[1:]) != list(node.input[1:])
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert said["accuracy"] == "0.99"
    assert '"backend": "x86"' in said["qat_lightning.quantize.recipe"]
    assert str(Path(__file__).parents[1]).encode() not in path.read_bytes()  # no path of this machine
    assert [value.name for value in model.graph.input] == ["x"]
    assert [value.name for value in model.graph.output] == ["output"]
    assert any(tensor.name.startswith("stem.0") for tensor in model.graph.initializer)


def test_outputs_are_named_by_their_keys(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "nested")
    path = export_onnx(trained(case), tmp_path / "int8.onnx", case.inputs())
    model = onnx.load(path)
    assert [value.name for value in model.graph.output] == ["logits", "parts_0", "parts_1_0"]
    assert [value.name for value in model.graph.input] == ["batch_image", "batch_facts_0", "extra"]


@pytest.fixture
def exported(tmp_path: Path) -> tuple[nn.Module, list[Path]]:
    prepared = prepare(Residual())
    train_steps(prepared, ((images(),), {}))
    graph = export_onnx(prepared, tmp_path / "int8.onnx", (images(),))
    return prepared, [graph, export_openvino(prepared, tmp_path / "int8.xml", (images(),))]


def test_any_batch_size_on_any_number_of_threads(exported: tuple[nn.Module, list[Path]]) -> None:
    prepared, paths = exported
    for path in paths:
        network = load_runtime(path, threads=1)
        x = torch.randn(63, *images().shape[1:])  # of a single image, a tie that tips is half of the noise
        for count in (1, 7):
            found = torch.cat([network(batch) for batch in x.split(count)])
            assert sqnr(call(prepared, (x,)), found) > 30


def test_the_trainers_own_test_scores_the_file(
    exported: tuple[nn.Module, list[Path]], tmp_path: Path
) -> None:
    prepared, paths = exported
    module = TinyModule(prepared)
    (expected,) = trainer(tmp_path).test(module, verbose=False)
    for path in paths:
        module.model = load_runtime(path)
        (found,) = trainer(tmp_path).test(module, verbose=False)
        assert found["test_accuracy"] == pytest.approx(expected["test_accuracy"], abs=0.1)


def test_another_number_of_inputs(exported: tuple[nn.Module, list[Path]]) -> None:
    _, paths = exported
    with pytest.raises(ValueError, match=r"takes 1 tensors \(x\), but received 2"):
        load_runtime(paths[0])(images(), images())


def test_openvino_wants_its_suffix_and_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"ends in \.xml"):
        export_openvino(Residual(), tmp_path / "int8.onnx", (images(),))
    monkeypatch.setattr("qat_lightning.export.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "qat-lightning\[openvino\]"'):
        export_openvino(Residual(), tmp_path / "int8.xml", (images(),))
    (tmp_path / "int8.onnx").write_bytes(b"")
    with pytest.raises(MissingExtraError, match=r'pip install "qat-lightning\[onnx\]"'):
        load_runtime(tmp_path / "int8.onnx", verify=False)


def test_a_file_that_disagrees_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, stranger = prepare(Residual()), prepare(Residual())
    for network in (prepared, stranger):
        train_steps(network, ((images(),), {}))
    monkeypatch.setattr("qat_lightning.export.onnx.reference", lambda _: reference(stranger))
    for export, name in ((export_onnx, "int8.onnx"), (export_openvino, "int8.xml")):
        with pytest.raises(ConversionError, match=r"dB only, below 20 dB.*No file was written"):
            export(prepared, tmp_path / name, (images(),))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_signals_after_openvino_files_were_dropped(tmp_path: Path, order: tuple[int, int]) -> None:
    """OpenVINO takes over the stack that Python handles signals on; it must not leave one that is freed."""
    prepared = prepare(Residual())
    train_steps(prepared, ((images(),), {}))
    path = export_openvino(prepared, tmp_path / "int8.xml", (images(),))
    script = (
        "import faulthandler, gc, os, signal\n"
        "from qat_lightning import load_runtime\n"
        "faulthandler.enable()\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled', flush=True))\n"
        f"networks = [load_runtime({str(path)!r}) for _ in range(2)]\n"
        f"for index in {order}:\n"
        "    networks[index] = None\n"
        "    gc.collect()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n")
